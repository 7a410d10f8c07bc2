/* SPDX-License-Identifier: MIT */
/* One connection: whole frames in and out of a non-blocking socket, with time limits. */
#pragma once

#include "proto.h"

enum {
        CONN_REQUEST_MS = 10 * 1000, /* from accept to a whole request */
        CONN_LINGER_MS = 5 * 1000,   /* from our last frame to the peer's close */

        /* What one send may hold. Newer kernels (6.17, and stable ones) spread more than 32 KiB over several
         * descriptors, of which Firecracker 1.12 sends the first ones twice when the host's socket fills up:
         * firecracker-microvm/firecracker#5475, mended by its #5485. */
        CONN_SEND_MAX = 28 * 1024,
};

struct conn {
        int fd;
        char *name;         /* argv[0] of this process */
        bool owns_machine;  /* may set the clock and power off */
        bool init_finished; /* the image's init has told us so */
        bool hurried;       /* what the peer does not take at once is not sent */
};

struct frame {
        uint8_t type;
        uint8_t *payload;
        size_t size;
};

int conn_receive(struct conn *conn, uint64_t deadline_ms, struct frame *ret);
int conn_send(struct conn *conn, uint8_t type, const void *payload, size_t size);
int conn_reply(struct conn *conn, uint8_t type, const struct builder *builder);
int conn_receive_request(struct conn *conn, uint64_t deadline_ms, struct frame *ret);
void conn_linger(struct conn *conn);

/* Send an ERROR frame; both return a negative errno so that a handler can end with them. */
int conn_fail(struct conn *conn, const char *code, const char *format, ...) _printf_(3, 4);
int conn_fail_errno(struct conn *conn, int error, const char *format, ...) _printf_(3, 4);
int conn_bad_request(struct conn *conn, const char *what);
const char *code_of_errno(int error);
