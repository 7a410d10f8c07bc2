/* SPDX-License-Identifier: MIT */
/* Whether the agent lives, asked for next to nothing: the process that accepts connections gives back each byte
 * itself. A process for every question, several times a minute, would be most of what an idle guest does. */
#pragma once

#include <poll.h>
#include <stdbool.h>

enum { PULSES_MAX = 4, PULSE_ITEMS = PULSES_MAX + 1 };

struct pulse {
        int listen_fd; /* -1: nobody can ask */
        int fds[PULSES_MAX];
};

void pulse_init(struct pulse *pulse, int listen_fd);

/* Fills PULSE_ITEMS items to wait for. */
void pulse_items(const struct pulse *pulse, struct pollfd *items);

/* Answers what those items found; `given` as in accept_host. */
void pulse_serve(struct pulse *pulse, const struct pollfd *items, bool given);

/* In a process that is somebody else now. */
void pulse_close(struct pulse *pulse);
