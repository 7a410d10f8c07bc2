/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>

#include "exec.h"
#include "log.h"

static int append(char ***list, size_t *count, size_t capacity, char *item) {
        if (!*list)
                *list = calloc(capacity + 1, sizeof **list);
        if (!*list)
                return -ENOMEM;
        (*list)[(*count)++] = item;
        return 0;
}

static int parse_size(const struct field *field, uint16_t *ret) {
        uint64_t value;
        int r = field_u64(field, UINT16_MAX, &value);

        *ret = r < 0 ? 0 : (uint16_t) value;
        return r;
}

static int parse_field(struct exec_request *request, const struct field *field, size_t capacity) {
        char *text;
        int r;

        switch (field->tag) {
        case TAG_ARGUMENT:
                r = field_string(field, &text);
                return r < 0 ? r : append(&request->arguments, &request->argument_count, capacity, text);
        case TAG_ENVIRONMENT:
                r = field_string(field, &text);
                if (r < 0)
                        return r;
                if (*text == '=' || !strchr(text, '='))
                        return -EBADMSG;
                return append(&request->environment, &request->environment_count, capacity, text);
        case TAG_DIRECTORY:
                return field_string(field, &request->directory);
        case TAG_USER:
                return field_string(field, &request->user);
        case TAG_TTY:
                return field_bool(field, &request->tty);
        case TAG_STDIN:
                return field_bool(field, &request->stdin_open);
        case TAG_ROWS:
                return parse_size(field, &request->rows);
        case TAG_COLUMNS:
                return parse_size(field, &request->columns);
        default:
                return -EBADMSG;
        }
}

/* The strings of the request point into the payload. */
int exec_request_parse(uint8_t *payload, size_t size, struct exec_request *ret) {
        struct fields fields = { .next = payload, .end = payload + size };
        struct field field;
        int r;

        *ret = (struct exec_request) { 0 };
        while ((r = fields_next(&fields, &field)) > 0) {
                r = parse_field(ret, &field, size / FIELD_HEADER_SIZE);
                if (r < 0)
                        break;
        }
        if (r == 0 && (ret->argument_count == 0 || *ret->arguments[0] == 0))
                r = -EBADMSG;
        if (r < 0)
                exec_request_free(ret);
        return r;
}

void exec_request_free(struct exec_request *request) {
        free(request->arguments);
        free(request->environment);
        request->arguments = request->environment = NULL;
}

static void close_process(struct exec_process *process) {
        close_fdp(&process->input);
        close_fdp(&process->output[0]);
        close_fdp(&process->output[1]);
        close_fdp(&process->status);
}

static int open_child_signals(void) {
        sigset_t mask;

        sigemptyset(&mask);
        sigaddset(&mask, SIGCHLD);
        if (sigprocmask(SIG_BLOCK, &mask, NULL) < 0)
                return -errno;
        int fd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);

        return fd < 0 ? -errno : fd;
}

static int run_request(struct conn *conn, const struct exec_request *request) {
        _cleanup_(close_process) struct exec_process process = { .input = -1, .output = { -1, -1 }, .status = -1 };
        _cleanup_close_ int signal_fd = -1;
        const char *name = request->user ? request->user : "root";
        struct user user;
        int r;

        r = user_lookup("/etc/passwd", "/etc/group", name, &user);
        if (r < 0)
                return conn_fail(conn, "not_found", "no such user or group in the guest: %s", name);
        signal_fd = open_child_signals();
        if (signal_fd < 0)
                return conn_fail_errno(conn, -signal_fd, "cannot watch processes");
        r = exec_spawn(request, &user, &process);
        if (r < 0)
                return conn_fail_errno(conn, -r, "cannot start a process");
        return exec_pump(conn, request, &process, signal_fd);
}

int serve_exec(struct conn *conn, struct frame *frame) {
        struct exec_request request;
        int r = exec_request_parse(frame->payload, frame->size, &request);

        if (r < 0)
                return conn_bad_request(conn, "malformed exec request");
        r = run_request(conn, &request);
        exec_request_free(&request);
        return r;
}
