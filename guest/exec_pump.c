/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "exec.h"
#include "exec_input.h"
#include "io.h"

enum {
        DRAIN_MS = 250,   /* how long after the exit a process left behind may still write */
        HANGUP_MS = 2000, /* from SIGHUP to SIGKILL when the client is gone */

        TTY_HELD_MAX = 64 * 1024, /* more than a pty holds: some 20 KiB */
};

/* A process serves one exec. Buffers hold whole frames: a header and a payload. */
static uint8_t in_buffer[FRAME_HEADER_SIZE + FRAME_PAYLOAD_MAX];
static uint8_t out_buffer[FRAME_HEADER_SIZE + FRAME_PAYLOAD_MAX];

struct stream {
        int fd;
        uint8_t type;
        bool readable;
        bool limited; /* the process is gone: only what is in the pipe now still counts */
        size_t left;
};

struct pump {
        struct conn *conn;
        struct exec_process *process;
        int signal_fd;

        size_t in_used;
        size_t out_sent, out_used;

        struct exec_input input;
        struct stream streams[2];
        size_t next_stream;

        bool started, start_sent, exited, exit_sent;
        int wait_status;
        uint64_t drain_ms;

        uint64_t pending_signals;
        bool hung_up;
        uint64_t kill_ms;
};

static void signal_group(const struct pump *pump, int number) {
        /* The process is not reaped before exited is set, so its number is still its own. */
        if (!pump->exited)
                (void) kill(-pump->process->pid, number);
}

static void close_streams(struct pump *pump) {
        close_fdp(&pump->input.fd);
        for (size_t i = 0; i < ELEMENTSOF(pump->streams); i++)
                close_fdp(&pump->streams[i].fd);
}

/* The client is gone or talks nonsense: nobody reads the output any more. */
static void hang_up(struct pump *pump) {
        if (pump->hung_up)
                return;
        pump->hung_up = true;
        pump->kill_ms = now_ms() + HANGUP_MS;
        close_streams(pump);
        signal_group(pump, SIGHUP);
        signal_group(pump, SIGCONT);
}

static int violation(struct pump *pump, const char *what) {
        hang_up(pump);
        /* Who does not read it must not keep us from ending the command. */
        pump->conn->hurried = true;
        /* In the middle of another frame an ERROR frame would be noise. */
        if (pump->out_sent == 0)
                (void) conn_fail(pump->conn, "protocol_error", "%s", what);
        return -EBADMSG;
}

static void deliver_signal(struct pump *pump, int number) {
        if (pump->started)
                signal_group(pump, number);
        else
                pump->pending_signals |= UINT64_C(1) << (number - 1);
}

static void deliver_pending_signals(struct pump *pump) {
        for (int number = 1; number <= 64; number++)
                if (pump->pending_signals & UINT64_C(1) << (number - 1))
                        signal_group(pump, number);
        pump->pending_signals = 0;
}

static int take_stdin(struct pump *pump, const uint8_t *data, size_t size) {
        const char *fault = exec_input_take(&pump->input, data, size);

        return fault ? violation(pump, fault) : 0;
}

static int take_resize(struct pump *pump, uint8_t *payload, size_t size) {
        struct fields fields = { .next = payload, .end = payload + size };
        struct winsize window = { 0 };
        struct field field;
        int r;

        while ((r = fields_next(&fields, &field)) > 0) {
                uint64_t value;

                if (field_u64(&field, UINT16_MAX, &value) < 0)
                        return violation(pump, "malformed resize");
                if (field.tag == TAG_ROWS)
                        window.ws_row = (unsigned short) value;
                else if (field.tag == TAG_COLUMNS)
                        window.ws_col = (unsigned short) value;
                else
                        return violation(pump, "malformed resize");
        }
        if (r < 0)
                return violation(pump, "malformed resize");
        if (pump->input.tty && pump->streams[0].fd >= 0)
                (void) ioctl(pump->streams[0].fd, TIOCSWINSZ, &window);
        return 0;
}

static int take_signal(struct pump *pump, uint8_t *payload, size_t size) {
        struct fields fields = { .next = payload, .end = payload + size };
        struct field field;
        uint64_t number;

        if (fields_next(&fields, &field) != 1 || field.tag != TAG_SIGNAL || field_u64(&field, 64, &number) < 0 ||
            number == 0 || fields.next != fields.end)
                return violation(pump, "malformed signal");
        deliver_signal(pump, (int) number);
        return 0;
}

static int take_frame(struct pump *pump, uint8_t type, uint8_t *payload, size_t size) {
        switch (type) {
        case FRAME_STDIN:
                return take_stdin(pump, payload, size);
        case FRAME_RESIZE:
                return take_resize(pump, payload, size);
        case FRAME_SIGNAL:
                return take_signal(pump, payload, size);
        default:
                return violation(pump, "unexpected frame during exec");
        }
}

/* Takes the whole frames out of the buffer and keeps the rest. */
static int take_frames(struct pump *pump) {
        size_t done = 0;

        while (pump->in_used - done >= FRAME_HEADER_SIZE) {
                uint8_t type;
                size_t size;
                int r = frame_header_read(in_buffer + done, &type, &size);

                if (r < 0)
                        return violation(pump, "frame too large");
                if (pump->in_used - done - FRAME_HEADER_SIZE < size)
                        break;
                r = take_frame(pump, type, in_buffer + done + FRAME_HEADER_SIZE, size);
                if (r < 0)
                        return r;
                done += FRAME_HEADER_SIZE + size;
        }
        memmove(in_buffer, in_buffer + done, pump->in_used - done);
        pump->in_used -= done;
        return 0;
}

static void receive(struct pump *pump) {
        ssize_t n = recv(pump->conn->fd, in_buffer + pump->in_used, sizeof in_buffer - pump->in_used, MSG_DONTWAIT);

        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
        if (n <= 0) {
                hang_up(pump);
                return;
        }
        pump->in_used += (size_t) n;
        (void) take_frames(pump);
}

static void transmit(struct pump *pump) {
        while (pump->out_sent < pump->out_used) {
                size_t size = min_size(pump->out_used - pump->out_sent, CONN_SEND_MAX);
                ssize_t n = send(pump->conn->fd, out_buffer + pump->out_sent, size, MSG_DONTWAIT | MSG_NOSIGNAL);

                if (n < 0 && (errno == EAGAIN || errno == EINTR))
                        return;
                if (n < 0) {
                        hang_up(pump);
                        return;
                }
                pump->out_sent += (size_t) n;
        }
        pump->out_sent = pump->out_used = 0;
}

static void compose(struct pump *pump, uint8_t type, size_t size) {
        frame_header_write(out_buffer, type, size);
        pump->out_used = FRAME_HEADER_SIZE + size;
}

static void compose_fields(struct pump *pump, uint8_t type, const struct builder *builder) {
        memcpy(out_buffer + FRAME_HEADER_SIZE, builder->data, builder->used);
        compose(pump, type, builder->used);
}

static void compose_number(struct pump *pump, uint8_t type, uint8_t tag, uint64_t value) {
        struct builder builder;

        builder.used = 0;
        builder.full = false;
        builder_u64(&builder, tag, value);
        compose_fields(pump, type, &builder);
}

static void compose_exit(struct pump *pump) {
        bool signaled = WIFSIGNALED(pump->wait_status);
        struct builder builder;

        builder.used = 0;
        builder.full = false;
        builder_u64(&builder, TAG_EXIT_KIND, signaled ? EXIT_KIND_SIGNALED : EXIT_KIND_EXITED);
        builder_u64(&builder,
                    TAG_EXIT_CODE,
                    (uint64_t) (signaled ? WTERMSIG(pump->wait_status) : WEXITSTATUS(pump->wait_status)));
        compose_fields(pump, FRAME_EXIT, &builder);
        pump->exit_sent = true;
}

static void end_stream(struct pump *pump, struct stream *stream) {
        close_fdp(&stream->fd);
        compose(pump, stream->type, 0);
}

static void compose_output(struct pump *pump, struct stream *stream) {
        size_t wanted = stream->limited ? min_size(stream->left, FRAME_PAYLOAD_MAX) : FRAME_PAYLOAD_MAX;
        ssize_t n = wanted > 0 ? read(stream->fd, out_buffer + FRAME_HEADER_SIZE, wanted) : 0;

        stream->readable = false;
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
                if (stream->limited && errno == EAGAIN)
                        end_stream(pump, stream);
                return;
        }
        /* A pty whose other side is closed says EIO where a pipe says end of file. */
        if (n <= 0) {
                end_stream(pump, stream);
                return;
        }
        stream->left -= stream->limited ? (size_t) n : 0;
        compose(pump, stream->type, (size_t) n);
}

static bool all_streams_ended(const struct pump *pump) {
        return pump->streams[0].fd < 0 && pump->streams[1].fd < 0;
}

/* Puts the next frame into the empty output buffer; control frames go first, so output never delays them. */
static void compose_next(struct pump *pump) {
        size_t grant;

        if (!pump->started)
                return;
        if (!pump->start_sent) {
                compose_number(pump, FRAME_STARTED, TAG_PID, (uint64_t) pump->process->pid);
                pump->start_sent = true;
                return;
        }
        grant = exec_input_grant(&pump->input);
        if (grant > 0) {
                compose_number(pump, FRAME_WINDOW, TAG_COUNT, grant);
                return;
        }
        for (size_t i = 0; i < ELEMENTSOF(pump->streams) && pump->out_used == 0; i++) {
                struct stream *stream = pump->streams + pump->next_stream;

                pump->next_stream = (pump->next_stream + 1) % ELEMENTSOF(pump->streams);
                if (stream->fd >= 0 && (stream->readable || stream->limited))
                        compose_output(pump, stream);
        }
        if (pump->out_used == 0 && pump->exited && !pump->exit_sent && all_streams_ended(pump))
                compose_exit(pump);
}

/* What the process itself wrote is in the pipe when it exits; what others write later must not hold up the exit. */
static void limit_streams(struct pump *pump) {
        for (size_t i = 0; i < ELEMENTSOF(pump->streams); i++) {
                struct stream *stream = pump->streams + i;
                int left = 0;

                if (stream->fd < 0 || stream->limited)
                        continue;
                /* Of what a pty holds FIONREAD tells the first 4 KiB; reading gets all of it. */
                if (pump->input.tty)
                        left = TTY_HELD_MAX;
                else
                        (void) ioctl(stream->fd, FIONREAD, &left);
                stream->limited = true;
                stream->left = left > 0 ? (size_t) left : 0;
        }
}

static void reap(struct pump *pump) {
        struct signalfd_siginfo info;

        while (read(pump->signal_fd, &info, sizeof info) > 0)
                ;
        if (pump->exited || waitpid(pump->process->pid, &pump->wait_status, WNOHANG) != pump->process->pid)
                return;
        pump->exited = true;
        pump->drain_ms = now_ms() + DRAIN_MS;
}

/* Returns 1 while there is more to do. */
static int read_status(struct pump *pump) {
        struct exec_failure failure;
        ssize_t n = read(pump->process->status, &failure, sizeof failure);

        if (n < 0 && errno == EINTR)
                return 1;
        close_fdp(&pump->process->status);
        if (n != sizeof failure) {
                pump->started = true;
                deliver_pending_signals(pump);
                return 1;
        }
        failure.what[sizeof failure.what - 1] = 0;
        (void) waitpid(pump->process->pid, &pump->wait_status, 0);
        pump->exited = true;
        return conn_fail_errno(pump->conn, failure.error, "cannot set up the process: %s", failure.what);
}

enum { POLL_CONN, POLL_SIGNAL, POLL_STATUS, POLL_INPUT, POLL_STDOUT, POLL_STDERR, POLL_COUNT };

static uint64_t next_deadline(const struct pump *pump) {
        if (pump->hung_up)
                return pump->kill_ms;
        if (pump->exited && !all_streams_ended(pump) && !(pump->streams[0].limited || pump->streams[1].limited))
                return pump->drain_ms;
        return UINT64_MAX;
}

static int wait_events(const struct pump *pump, struct pollfd *items) {
        bool may_read = pump->start_sent && pump->out_used == 0;
        short conn_events = (short) (POLLIN | (pump->out_used > 0 ? POLLOUT : 0));

        items[POLL_CONN] = (struct pollfd) { .fd = pump->hung_up ? -1 : pump->conn->fd, .events = conn_events };
        items[POLL_SIGNAL] = (struct pollfd) { .fd = pump->signal_fd, .events = POLLIN };
        items[POLL_STATUS] = (struct pollfd) { .fd = pump->process->status, .events = POLLIN };
        items[POLL_INPUT] = (struct pollfd) {
                .fd = pump->input.used > 0 ? pump->input.fd : -1,
                .events = POLLOUT,
        };
        for (int i = 0; i < 2; i++)
                items[POLL_STDOUT + i] = (struct pollfd) {
                        .fd = may_read ? pump->streams[i].fd : -1,
                        .events = POLLIN,
                };
        for (int i = 0; i < POLL_COUNT; i++)
                items[i].revents = 0;
        if (poll(items, POLL_COUNT, poll_timeout(next_deadline(pump))) < 0 && errno != EINTR)
                return -errno;
        return 0;
}

static void handle_deadlines(struct pump *pump) {
        uint64_t now = now_ms();

        if (pump->hung_up && now >= pump->kill_ms) {
                signal_group(pump, SIGKILL);
                pump->kill_ms = now + HANGUP_MS;
        }
        if (!pump->hung_up && pump->exited && now >= pump->drain_ms)
                limit_streams(pump);
}

static int handle_events(struct pump *pump, const struct pollfd *items) {
        int r = 1;

        if (items[POLL_STATUS].revents)
                r = read_status(pump);
        if (r <= 0)
                return r;
        if (items[POLL_SIGNAL].revents)
                reap(pump);
        for (int i = 0; i < 2; i++)
                if (items[POLL_STDOUT + i].revents)
                        pump->streams[i].readable = true;
        if (items[POLL_INPUT].revents && pump->input.fd >= 0)
                exec_input_feed(&pump->input);
        if (!pump->hung_up && items[POLL_CONN].revents & (POLLIN | POLLHUP | POLLERR))
                receive(pump);
        return 1;
}

static bool is_done(const struct pump *pump) {
        if (pump->hung_up)
                return pump->exited;
        return pump->exit_sent && pump->out_used == 0;
}

/* One frame may follow from the last without any event: the exit from the end of the output, for one. */
static void send_what_is_there(struct pump *pump) {
        while (!pump->hung_up) {
                if (pump->out_used == 0)
                        compose_next(pump);
                if (pump->out_used == 0)
                        return;
                transmit(pump);
                if (pump->out_used > 0)
                        return;
        }
}

static int run(struct pump *pump) {
        struct pollfd items[POLL_COUNT];
        int r;

        while (!is_done(pump)) {
                r = wait_events(pump, items);
                if (r < 0)
                        return r;
                r = handle_events(pump, items);
                if (r <= 0)
                        return r;
                handle_deadlines(pump);
                exec_input_finish(&pump->input);
                send_what_is_there(pump);
        }
        return pump->hung_up ? -ECONNRESET : 0;
}

int exec_pump(struct conn *conn, const struct exec_request *request, struct exec_process *process, int signal_fd) {
        struct pump pump = {
                .conn = conn,
                .process = process,
                .signal_fd = signal_fd,
                .input = {
                        .fd = take_fd(&process->input),
                        .tty = request->tty,
                        .expected = request->stdin_open,
                },
                .streams = {
                        { .fd = take_fd(&process->output[0]), .type = FRAME_STDOUT },
                        { .fd = take_fd(&process->output[1]), .type = FRAME_STDERR },
                },
        };
        int r = run(&pump);

        close_streams(&pump);
        return r;
}
