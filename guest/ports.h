/* SPDX-License-Identifier: MIT */
/* One line of /proc/net/{tcp,tcp6,udp,udp6}. Parsing only. */
#pragma once

#include <stdbool.h>

#include "macro.h"

struct port {
        char address[46];
        uint16_t number;
        uint64_t inode;
};

/* Returns 1 with a listening socket, 0 for a line of another kind. */
int port_parse(char *line, bool is_tcp, struct port *ret);
