/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "connect.h"
#include "io.h"

/* A process serves one connection. Each buffer holds one whole frame, and nothing is read that has no room:
 * who does not take data keeps the other side from sending. */
static uint8_t in_buffer[FRAME_HEADER_SIZE + FRAME_PAYLOAD_MAX];
static uint8_t out_buffer[FRAME_HEADER_SIZE + FRAME_PAYLOAD_MAX];

struct pump {
        struct conn *conn;
        int fd;
        bool datagrams;

        size_t in_used, in_done; /* bytes held; of the first frame's payload, bytes passed on */
        size_t out_used, out_sent;

        bool in_ended;  /* the client has sent its end, or the service takes no more */
        bool out_ended; /* the service has sent its end */
};

static bool is_transient(int error) {
        return error == EAGAIN || error == EINTR;
}

static int violation(struct pump *pump, const char *what) {
        /* In the middle of another frame an ERROR frame would be noise. */
        if (pump->out_sent == 0)
                (void) conn_fail(pump->conn, "protocol_error", "%s", what);
        return -EBADMSG;
}

/* Returns 1 with the size of a whole frame's payload, 0 while there is none. */
static int first_frame(struct pump *pump, size_t *ret_size) {
        uint8_t type;
        size_t size;

        if (pump->in_used < FRAME_HEADER_SIZE)
                return 0;
        if (frame_header_read(in_buffer, &type, &size) < 0)
                return violation(pump, "frame too large");
        if (type != FRAME_DATA)
                return violation(pump, "unexpected frame during connect");
        *ret_size = size;
        return pump->in_used - FRAME_HEADER_SIZE >= size;
}

static void drop_frame(struct pump *pump, size_t size) {
        size_t whole = FRAME_HEADER_SIZE + size;

        memmove(in_buffer, in_buffer + whole, pump->in_used - whole);
        pump->in_used -= whole;
        pump->in_done = 0;
}

/* Returns how much of it was taken, or a negative errno. */
static ssize_t pass_on(struct pump *pump, const uint8_t *data, size_t size) {
        ssize_t n = send(pump->fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (n >= 0)
                return n;
        if (is_transient(errno))
                return -EAGAIN;
        /* A datagram that nobody takes is lost, as on any network; a service that is gone takes nothing more. */
        if (!pump->datagrams)
                pump->in_ended = true;
        return (ssize_t) size;
}

static int feed(struct pump *pump) {
        size_t size;
        int r;

        while ((r = first_frame(pump, &size)) > 0) {
                ssize_t n = 0;

                if (size == 0) {
                        pump->in_ended = true;
                        (void) shutdown(pump->fd, SHUT_WR);
                } else if (!pump->in_ended) {
                        n = pass_on(pump, in_buffer + FRAME_HEADER_SIZE + pump->in_done, size - pump->in_done);
                        if (n == -EAGAIN)
                                return 0;
                        pump->in_done += (size_t) n;
                        if (!pump->in_ended && pump->in_done < size)
                                continue;
                }
                drop_frame(pump, size);
        }
        return r;
}

static int receive(struct pump *pump) {
        ssize_t n = recv(pump->conn->fd, in_buffer + pump->in_used, sizeof in_buffer - pump->in_used, MSG_DONTWAIT);

        if (n < 0 && is_transient(errno))
                return 0;
        if (n <= 0)
                return -ECONNRESET;
        pump->in_used += (size_t) n;
        return feed(pump);
}

static int transmit(struct pump *pump) {
        while (pump->out_sent < pump->out_used) {
                size_t size = min_size(pump->out_used - pump->out_sent, CONN_SEND_MAX);
                ssize_t n = send(pump->conn->fd, out_buffer + pump->out_sent, size, MSG_DONTWAIT | MSG_NOSIGNAL);

                if (n < 0)
                        return is_transient(errno) ? 0 : -errno;
                pump->out_sent += (size_t) n;
        }
        pump->out_sent = pump->out_used = 0;
        return 0;
}

static int take_output(struct pump *pump) {
        ssize_t n = recv(pump->fd, out_buffer + FRAME_HEADER_SIZE, FRAME_PAYLOAD_MAX, MSG_DONTWAIT);

        if (n < 0 && (is_transient(errno) || pump->datagrams))
                return 0;
        if (n < 0)
                return conn_fail_errno(pump->conn, errno, "the connection in the guest was lost");
        if (n == 0 && pump->datagrams) /* an empty frame would be the end */
                return 0;
        pump->out_ended = n == 0;
        frame_header_write(out_buffer, FRAME_DATA, (size_t) n);
        pump->out_used = FRAME_HEADER_SIZE + (size_t) n;
        return transmit(pump);
}

enum { POLL_CONN, POLL_SERVICE, POLL_COUNT };

/* A client that closes is seen even while nothing of it is read. */
static int wait_events(const struct pump *pump, bool waiting, struct pollfd *items) {
        bool sending = pump->out_used > 0;
        int conn_events = POLLRDHUP | (waiting ? 0 : POLLIN) | (sending ? POLLOUT : 0);
        int events = (sending || pump->out_ended ? 0 : POLLIN) | (waiting ? POLLOUT : 0);

        items[POLL_CONN] = (struct pollfd) { .fd = pump->conn->fd, .events = (short) conn_events };
        items[POLL_SERVICE] = (struct pollfd) { .fd = events ? pump->fd : -1, .events = (short) events };
        if (poll(items, POLL_COUNT, -1) < 0 && errno != EINTR)
                return -errno;
        return 0;
}

static int turn(struct pump *pump) {
        struct pollfd items[POLL_COUNT] = { 0 };
        size_t size;
        int r = first_frame(pump, &size);

        if (r >= 0)
                r = wait_events(pump, r > 0, items);
        if (r >= 0 && items[POLL_CONN].revents & (POLLRDHUP | POLLHUP | POLLERR))
                return -ECONNRESET;
        if (r >= 0 && items[POLL_CONN].revents & POLLOUT)
                r = transmit(pump);
        if (r >= 0 && items[POLL_CONN].revents & POLLIN)
                r = receive(pump);
        if (r >= 0 && items[POLL_SERVICE].revents & (POLLOUT | POLLHUP | POLLERR))
                r = feed(pump);
        if (r >= 0 && items[POLL_SERVICE].revents & (POLLIN | POLLHUP | POLLERR) && pump->out_used == 0 &&
            !pump->out_ended)
                r = take_output(pump);
        return r;
}

int connect_pump(struct conn *conn, int fd, bool datagrams) {
        struct pump pump = { .conn = conn, .fd = fd, .datagrams = datagrams };

        /* Datagrams have no end: a client closes when it has enough. */
        while (datagrams || !pump.in_ended || !pump.out_ended || pump.out_used > 0) {
                int r = turn(&pump);

                if (r < 0)
                        return r;
        }
        return 0;
}
