/* SPDX-License-Identifier: MIT */
/* Sockets that the host alone may connect to. */
#pragma once

#include <stdbool.h>

/* Where nobody handed us a socket: the host's CID on a vsock port. Returns the socket or a negative errno. */
int listen_vsock(unsigned port);

/* Accepts a connection of the host's, or, on a socket that was given, of our own user's; -1 when there is none. */
int accept_host(int listen_fd, bool given);
