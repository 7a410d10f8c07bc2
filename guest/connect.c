/* SPDX-License-Identifier: MIT */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "connect.h"
#include "io.h"

enum { CONNECT_MS = 10 * 1000 }; /* a local service whose backlog is full does not answer */

static int parse_protocol(const char *text, bool *ret_datagrams) {
        *ret_datagrams = strcmp(text, "udp") == 0;
        return *ret_datagrams || strcmp(text, "tcp") == 0 ? 0 : -EBADMSG;
}

/* The kernel lets datagrams come from a group, which is nobody's own, and go to it. */
static bool is_multicast(const void *v4) {
        return (*(const uint8_t *) v4 & 0xf0) == 0xe0;
}

static int parse_address(const char *text, union connect_address *ret) {
        *ret = (union connect_address) { 0 };
        if (inet_pton(AF_INET, text, &ret->v4.sin_addr) == 1) {
                ret->any.sa_family = AF_INET;
                return ret->v4.sin_addr.s_addr == htonl(INADDR_ANY) || is_multicast(&ret->v4.sin_addr) ? -EBADMSG : 0;
        }
        if (inet_pton(AF_INET6, text, &ret->v6.sin6_addr) == 1) {
                const struct in6_addr *address = &ret->v6.sin6_addr;

                ret->any.sa_family = AF_INET6;
                if (IN6_IS_ADDR_V4MAPPED(address) && is_multicast(address->s6_addr + 12))
                        return -EBADMSG;
                return IN6_IS_ADDR_UNSPECIFIED(address) || IN6_IS_ADDR_MULTICAST(address) ? -EBADMSG : 0;
        }
        return -EBADMSG;
}

static int parse_field(struct connect_request *request, const struct field *field) {
        uint64_t port;
        char *text;
        int r;

        switch (field->tag) {
        case TAG_PROTOCOL:
                r = field_string(field, &text);
                return r < 0 ? r : parse_protocol(text, &request->datagrams);
        case TAG_ADDRESS:
                r = field_string(field, &text);
                request->address_given = true;
                return r < 0 ? r : parse_address(text, &request->address);
        case TAG_PORT:
                r = field_u64(field, UINT16_MAX, &port);
                request->port = r < 0 ? 0 : (uint16_t) port;
                return r;
        default:
                return -EBADMSG;
        }
}

int connect_request_parse(uint8_t *payload, size_t size, struct connect_request *ret) {
        struct fields fields = { .next = payload, .end = payload + size };
        struct field field;
        int r;

        *ret = (struct connect_request) { 0 };
        while ((r = fields_next(&fields, &field)) > 0) {
                r = parse_field(ret, &field);
                if (r < 0)
                        return r;
        }
        return r == 0 && ret->port == 0 ? -EBADMSG : r;
}

static socklen_t size_of(const union connect_address *address) {
        return address->any.sa_family == AF_INET ? sizeof address->v4 : sizeof address->v6;
}

static void set_port(union connect_address *address, uint16_t port) {
        if (address->any.sa_family == AF_INET)
                address->v4.sin_port = htons(port);
        else
                address->v6.sin6_port = htons(port);
}

static int finish_connect(int fd) {
        int error = 0, r = wait_fd(fd, POLLOUT, now_ms() + CONNECT_MS);
        socklen_t size = sizeof error;

        if (r < 0)
                return r;
        if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0)
                return -errno;
        return -error;
}

static bool is_own_port(int fd, uint16_t port) {
        union connect_address own = { 0 };
        socklen_t size = sizeof own;

        if (getsockname(fd, &own.any, &size) < 0)
                return false;
        return ntohs(own.any.sa_family == AF_INET ? own.v4.sin_port : own.v6.sin6_port) == port;
}

/* Coming from the address that it goes to, a connection cannot leave the guest: bind() takes only its own addresses,
 * so that nobody uses the agent to reach others. Returns a descriptor. */
static int open_to(union connect_address address, uint16_t port, bool datagrams) {
        int type = (datagrams ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC | SOCK_NONBLOCK, on = 1, r;
        _cleanup_close_ int fd = socket(address.any.sa_family, type, 0);

        if (fd < 0)
                return -errno;
        (void) setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        if (bind(fd, &address.any, size_of(&address)) < 0)
                return -errno;
        if (!datagrams)
                (void) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        set_port(&address, port);
        r = connect(fd, &address.any, size_of(&address)) < 0 ? -errno : 0;
        if (r == -EINPROGRESS)
                r = finish_connect(fd);
        if (r < 0 || !is_own_port(fd, port))
                return r < 0 ? r : take_fd(&fd);
        /* Nobody has the port, the kernel gave it to us, and we would talk to ourselves. While we have it there will
         * be another; then it goes back at once, without the minute that TCP keeps what was connected. */
        (void) setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger) { .l_onoff = 1 }, sizeof(struct linger));
        set_port(&address, 0);
        return open_to(address, port, datagrams);
}

/* Who names no address means the loopback of either family. */
static int open_any(const struct connect_request *request) {
        static const char *const loopback[] = { "127.0.0.1", "::1" };
        union connect_address address;
        int first = 0, fd = -1;

        if (request->address_given)
                return open_to(request->address, request->port, request->datagrams);
        for (size_t i = 0; i < ELEMENTSOF(loopback); i++) {
                (void) parse_address(loopback[i], &address);
                fd = open_to(address, request->port, request->datagrams);
                if (fd >= 0)
                        return fd;
                first = first ? first : fd;
        }
        return first;
}

int serve_connect(struct conn *conn, struct frame *frame) {
        _cleanup_close_ int fd = -1;
        struct connect_request request;
        int r;

        if (connect_request_parse(frame->payload, frame->size, &request) < 0)
                return conn_bad_request(conn, "malformed connect request");
        fd = open_any(&request);
        if (fd == -ECONNREFUSED)
                return conn_fail(conn, "refused", "nothing listens on port %u of the guest", request.port);
        if (fd == -EADDRNOTAVAIL)
                return conn_fail(conn, "bad_request", "the guest has no such address");
        if (fd < 0)
                return conn_fail_errno(conn, -fd, "cannot connect to port %u of the guest", request.port);
        r = conn_send(conn, FRAME_REPLY, NULL, 0);
        return r < 0 ? r : connect_pump(conn, fd, request.datagrams);
}
