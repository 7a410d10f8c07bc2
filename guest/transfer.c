/* SPDX-License-Identifier: MIT */
/* Files as tar streams. The streams can be read and written (tar_read.c, tar_write.c); the walk is not here yet. */
#include "agent.h"

int serve_put(struct conn *conn, struct frame *frame) {
        (void) frame;
        return conn_fail(conn, "unsupported", "this agent does not take files yet");
}

int serve_get(struct conn *conn, struct frame *frame) {
        (void) frame;
        return conn_fail(conn, "unsupported", "this agent does not hand out files yet");
}
