/* SPDX-License-Identifier: MIT */
/* The life of one connection: hello, one request, its answer. Short requests have their handlers here. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "agent.h"
#include "connect.h"
#include "exec.h"
#include "io.h"
#include "machine.h"

enum { NS_PER_S = 1000000000, NO_LIMIT = 0 };

static const struct request {
        uint8_t type;
        unsigned limit_s; /* a request that moves no data ends its process after this long */
        int (*serve)(struct conn *conn, struct frame *frame);
        bool holds_files; /* open in the guest's file systems, which could not be unmounted */
} requests[] = {
        { FRAME_HEALTH, 10, serve_health, false },
        { FRAME_EXEC, NO_LIMIT, serve_exec, false },
        { FRAME_PUT, NO_LIMIT, serve_put, true },
        { FRAME_GET, NO_LIMIT, serve_get, true },
        { FRAME_PORTS, 30, serve_ports, false },
        { FRAME_FLUSH, 300, serve_flush, false },
        { FRAME_POWER_OFF, NO_LIMIT, serve_power_off, false },
        { FRAME_TIME, 10, serve_time, false },
        { FRAME_CONNECT, NO_LIMIT, serve_connect, false },
};

static int parse_hello(const struct frame *frame, uint64_t *ret_version) {
        struct fields fields = { .next = frame->payload, .end = frame->payload + frame->size };
        struct field field;
        bool magic = false;
        int r;

        *ret_version = 0;
        if (frame->type != FRAME_HELLO)
                return -EBADMSG;
        while ((r = fields_next(&fields, &field)) > 0) {
                if (field.tag == TAG_MAGIC)
                        magic = field.size == strlen(PROTO_MAGIC) && memcmp(field.data, PROTO_MAGIC, field.size) == 0;
                else if (field.tag == TAG_VERSION && field_u64(&field, UINT32_MAX, ret_version) < 0)
                        return -EBADMSG;
        }
        return r < 0 || !magic ? -EBADMSG : 0;
}

static int send_hello(struct conn *conn) {
        struct builder builder = { 0 };
        char boot_id[BOOT_ID_SIZE];

        machine_boot_id(boot_id);
        builder_string(&builder, TAG_MAGIC, PROTO_MAGIC);
        builder_u64(&builder, TAG_VERSION_MIN, PROTO_VERSION_MIN);
        builder_u64(&builder, TAG_VERSION_MAX, PROTO_VERSION_MAX);
        builder_string(&builder, TAG_AGENT_VERSION, BANGER_VERSION);
        builder_string(&builder, TAG_BOOT_ID, boot_id);
        return conn_reply(conn, FRAME_HELLO, &builder);
}

static int greet(struct conn *conn, uint64_t deadline_ms) {
        struct frame frame;
        uint64_t version;
        int r;

        r = conn_receive(conn, deadline_ms, &frame);
        if (r == -EMSGSIZE)
                return conn_fail(conn, "protocol_error", "frame too large");
        if (r < 0)
                return r;
        if (parse_hello(&frame, &version) < 0)
                return conn_fail(conn, "protocol_error", "the first frame is no hello");
        r = send_hello(conn);
        if (r < 0)
                return r;
        if (version < PROTO_VERSION_MIN || version > PROTO_VERSION_MAX)
                return conn_fail(conn, "version_mismatch", "this agent speaks another protocol version");
        return 0;
}

void give_up_protection(char *name) {
        if (*name == '@')
                memmove(name, name + 1, strlen(name));
}

static int dispatch(struct conn *conn, struct frame *frame) {
        for (size_t i = 0; i < ELEMENTSOF(requests); i++)
                if (requests[i].type == frame->type) {
                        alarm(requests[i].limit_s);
                        if (requests[i].holds_files)
                                give_up_protection(conn->name);
                        return requests[i].serve(conn, frame);
                }
        return conn_bad_request(conn, "unknown request");
}

static int serve_request(struct conn *conn, bool busy) {
        uint64_t deadline_ms = now_ms() + CONN_REQUEST_MS;
        struct frame frame;
        int r;

        r = greet(conn, deadline_ms);
        if (r < 0)
                return r;
        r = conn_receive_request(conn, deadline_ms, &frame);
        if (r == -EMSGSIZE)
                return conn_fail(conn, "protocol_error", "request too large");
        if (r < 0)
                return r;
        if (busy)
                return conn_fail(conn, "busy", "too many connections at once");
        return dispatch(conn, &frame);
}

int serve_connection(struct conn *conn, bool busy) {
        int r = serve_request(conn, busy);

        alarm(0);
        if (r >= 0 || r == -ECANCELED)
                conn_linger(conn);
        return r;
}

int serve_flush(struct conn *conn, struct frame *frame) {
        _cleanup_(lines_close) struct lines mounts = { .fd = -1 };
        char *line;
        int r;

        if (frame->size > 0)
                return conn_bad_request(conn, "flush takes no fields");
        sync();
        /* sync() does not tell of errors; syncfs() does. */
        r = lines_open(&mounts, "/proc/self/mounts");
        while (r >= 0 && lines_next(&mounts, &line) > 0) {
                const char *target = mounted_device(line);
                _cleanup_close_ int fd = target ? open(target, O_RDONLY | O_CLOEXEC | O_NONBLOCK) : -1;

                if (fd >= 0 && syncfs(fd) < 0)
                        return conn_fail_errno(conn, errno, "cannot flush %s", target);
        }
        return conn_send(conn, FRAME_REPLY, NULL, 0);
}

static int set_clock(struct conn *conn, uint64_t ns) {
        struct timespec time = { .tv_sec = (time_t) (ns / NS_PER_S), .tv_nsec = (long) (ns % NS_PER_S) };

        if (!conn->owns_machine)
                return conn_fail(conn, "unsupported", "the clock of this machine is not the agent's to set");
        if (clock_settime(CLOCK_REALTIME, &time) < 0)
                return conn_fail_errno(conn, errno, "cannot set the clock");
        return 0;
}

int serve_time(struct conn *conn, struct frame *frame) {
        struct fields fields = { .next = frame->payload, .end = frame->payload + frame->size };
        struct builder builder = { 0 };
        struct timespec now;
        struct field field;
        uint64_t ns;
        int r;

        while ((r = fields_next(&fields, &field)) > 0) {
                if (field.tag != TAG_REALTIME_NS || field_u64(&field, INT64_MAX, &ns) < 0)
                        return conn_bad_request(conn, "malformed time request");
                r = set_clock(conn, ns);
                if (r < 0)
                        return r;
        }
        if (r < 0)
                return conn_bad_request(conn, "malformed time request");
        clock_gettime(CLOCK_REALTIME, &now);
        builder_u64(&builder, TAG_REALTIME_NS, (uint64_t) now.tv_sec * NS_PER_S + (uint64_t) now.tv_nsec);
        return conn_reply(conn, FRAME_REPLY, &builder);
}
