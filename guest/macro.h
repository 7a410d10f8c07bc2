/* SPDX-License-Identifier: MIT */
/* Small things that every file of the guest binary uses. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#ifndef BANGER_VERSION
#define BANGER_VERSION "0"
#endif

#define ELEMENTSOF(x) (sizeof(x) / sizeof((x)[0]))
#define _cleanup_(f) __attribute__((cleanup(f)))
#define _printf_(a, b) __attribute__((format(printf, a, b)))
#define _cleanup_close_ _cleanup_(close_fdp)

static inline void close_fdp(int *fd) {
        if (*fd >= 0)
                close(*fd);
        *fd = -1;
}

static inline int take_fd(int *fd) {
        int taken = *fd;

        *fd = -1;
        return taken;
}

static inline size_t min_size(size_t a, size_t b) {
        return a < b ? a : b;
}
