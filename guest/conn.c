/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "conn.h"
#include "io.h"

/* A process serves one connection, so one buffer is enough. */
static uint8_t receive_buffer[FRAME_PAYLOAD_MAX];

static int receive_exactly(struct conn *conn, uint64_t deadline_ms, uint8_t *data, size_t size) {
        while (size > 0) {
                ssize_t n = recv(conn->fd, data, size, MSG_DONTWAIT);
                int r;

                if (n == 0)
                        return -ECONNRESET;
                if (n > 0) {
                        data += n;
                        size -= (size_t) n;
                        continue;
                }
                if (errno == EINTR)
                        continue;
                if (errno != EAGAIN)
                        return -errno;
                r = wait_fd(conn->fd, POLLIN, deadline_ms);
                if (r < 0)
                        return r;
        }
        return 0;
}

/* The payload stays valid until the next call. */
int conn_receive(struct conn *conn, uint64_t deadline_ms, struct frame *ret) {
        uint8_t header[FRAME_HEADER_SIZE];
        int r;

        r = receive_exactly(conn, deadline_ms, header, sizeof header);
        if (r < 0)
                return r;
        r = frame_header_read(header, &ret->type, &ret->size);
        if (r < 0)
                return r;
        ret->payload = receive_buffer;
        return receive_exactly(conn, deadline_ms, receive_buffer, ret->size);
}

/* Without a limit: a peer that takes nothing may be a pipe that its user pauses, and one that is gone has closed. */
static int wait_for_room(const struct conn *conn) {
        struct pollfd item = { .fd = conn->fd, .events = POLLOUT | POLLRDHUP };

        if (conn->hurried)
                return -ETIMEDOUT;
        while (poll(&item, 1, -1) < 0)
                if (errno != EINTR)
                        return -errno;
        return item.revents & (POLLRDHUP | POLLHUP | POLLERR) ? -ECONNRESET : 0;
}

int conn_send(struct conn *conn, uint8_t type, const void *payload, size_t size) {
        uint8_t header[FRAME_HEADER_SIZE];
        size_t sent = 0, total = sizeof header + size;

        if (size == 0)
                payload = header; /* nothing of it is sent, but it must not be NULL */
        frame_header_write(header, type, size);
        while (sent < total) {
                size_t in_header = sent < sizeof header ? sizeof header - sent : 0;
                size_t in_payload = sent + in_header - sizeof header;
                size_t next = min_size(size - in_payload, CONN_SEND_MAX);
                struct iovec parts[2] = {
                        { .iov_base = header + sizeof header - in_header, .iov_len = in_header },
                        { .iov_base = (uint8_t *) payload + in_payload, .iov_len = next },
                };
                struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };
                ssize_t n = sendmsg(conn->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
                int r;

                if (n >= 0) {
                        sent += (size_t) n;
                        continue;
                }
                if (errno == EINTR)
                        continue;
                if (errno != EAGAIN)
                        return -errno;
                r = wait_for_room(conn);
                if (r < 0)
                        return r;
        }
        return 0;
}

int conn_reply(struct conn *conn, uint8_t type, const struct builder *builder) {
        if (builder->full)
                return -EMSGSIZE;
        return conn_send(conn, type, builder->data, builder->used);
}

/* A request that does not fit in one frame comes as MORE frames in front of its own. */
int conn_receive_request(struct conn *conn, uint64_t deadline_ms, struct frame *ret) {
        static uint8_t *gathered;
        size_t used = 0;

        for (;;) {
                struct frame part;
                uint8_t *grown;
                int r = conn_receive(conn, deadline_ms, &part);

                if (r < 0)
                        return r;
                if (used == 0 && part.type != FRAME_MORE) {
                        *ret = part;
                        return 0;
                }
                if (part.size > REQUEST_SIZE_MAX - used || (part.type == FRAME_MORE && part.size == 0))
                        return -EMSGSIZE;
                grown = realloc(gathered, used + part.size + 1);
                if (!grown)
                        return -ENOMEM;
                gathered = grown;
                memcpy(gathered + used, part.payload, part.size);
                used += part.size;
                if (part.type == FRAME_MORE)
                        continue;
                *ret = (struct frame) { .type = part.type, .payload = gathered, .size = used };
                return 0;
        }
}

/* Closing with unread input resets the connection and may cost the peer our last frame, so read until it closes. */
void conn_linger(struct conn *conn) {
        uint64_t deadline_ms = now_ms() + CONN_LINGER_MS;

        while (wait_fd(conn->fd, POLLIN, deadline_ms) == 0) {
                ssize_t n = recv(conn->fd, receive_buffer, sizeof receive_buffer, MSG_DONTWAIT);

                if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
                        return;
        }
}

static int fail(struct conn *conn, const char *code, const char *message) {
        struct builder builder = { 0 };
        int r;

        builder_string(&builder, TAG_CODE, code);
        builder_string(&builder, TAG_MESSAGE, message);
        r = conn_reply(conn, FRAME_ERROR, &builder);
        return r < 0 ? r : -ECANCELED;
}

int conn_fail(struct conn *conn, const char *code, const char *format, ...) {
        char message[1024];
        va_list arguments;

        va_start(arguments, format);
        vsnprintf(message, sizeof message, format, arguments);
        va_end(arguments);
        return fail(conn, code, message);
}

int conn_fail_errno(struct conn *conn, int error, const char *format, ...) {
        char message[1024];
        va_list arguments;
        size_t used;

        va_start(arguments, format);
        vsnprintf(message, sizeof message, format, arguments);
        va_end(arguments);
        used = strlen(message);
        snprintf(message + used, sizeof message - used, ": %s", strerror(error));
        return fail(conn, code_of_errno(error), message);
}

int conn_bad_request(struct conn *conn, const char *what) {
        return conn_fail(conn, "bad_request", "%s", what);
}

const char *code_of_errno(int error) {
        switch (error) {
        case ENOENT:
        case ESRCH:
                return "not_found";
        case EPERM:
        case EACCES:
                return "permission_denied";
        case EEXIST:
        case EISDIR:
        case ENOTEMPTY:
                return "already_exists";
        case ENOSPC:
        case EDQUOT:
        case EFBIG:
                return "no_space";
        case EROFS:
                return "read_only";
        case ELOOP:
        case EXDEV:
        case ENOTDIR:
                return "unsafe_path";
        case EBADMSG:
                return "bad_archive";
        case EOPNOTSUPP:
        case ENOSYS:
                return "unsupported";
        case ETIMEDOUT:
                return "timeout";
        case ENAMETOOLONG:
        case EINVAL:
                return "bad_request";
        default:
                return "io_error";
        }
}
