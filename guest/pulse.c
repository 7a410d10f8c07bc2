/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "listen.h"
#include "macro.h"
#include "pulse.h"

void pulse_init(struct pulse *pulse, int listen_fd) {
        pulse->listen_fd = listen_fd;
        for (size_t i = 0; i < PULSES_MAX; i++)
                pulse->fds[i] = -1;
}

void pulse_items(const struct pulse *pulse, struct pollfd *items) {
        for (size_t i = 0; i < PULSES_MAX; i++)
                items[i] = (struct pollfd) { .fd = pulse->fds[i], .events = POLLIN };
        items[PULSES_MAX] = (struct pollfd) { .fd = pulse->listen_fd, .events = POLLIN };
}

/* One that asks faster than it takes the answers is none that we want. */
static bool answer(int fd) {
        char bytes[16];
        ssize_t n = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);

        if (n < 0)
                return errno == EAGAIN || errno == EINTR;
        return n > 0 && send(fd, bytes, (size_t) n, MSG_DONTWAIT | MSG_NOSIGNAL) == n;
}

/* The newest stays: a daemon that was killed leaves its connection until the VMM has noticed. */
static void keep(struct pulse *pulse, int fd) {
        size_t place = 0;

        while (place < PULSES_MAX && pulse->fds[place] >= 0)
                place++;
        if (place == PULSES_MAX) {
                close_fdp(&pulse->fds[0]);
                for (place = 0; place < PULSES_MAX - 1; place++)
                        pulse->fds[place] = pulse->fds[place + 1];
        }
        pulse->fds[place] = fd;
}

void pulse_serve(struct pulse *pulse, const struct pollfd *items, bool given) {
        for (size_t i = 0; i < PULSES_MAX; i++)
                if (items[i].revents && !answer(pulse->fds[i]))
                        close_fdp(&pulse->fds[i]);
        if (items[PULSES_MAX].revents) {
                int fd = accept_host(pulse->listen_fd, given);

                if (fd >= 0)
                        keep(pulse, fd);
        }
}

void pulse_close(struct pulse *pulse) {
        for (size_t i = 0; i < PULSES_MAX; i++)
                close_fdp(&pulse->fds[i]);
        close_fdp(&pulse->listen_fd);
}
