/* SPDX-License-Identifier: MIT */
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "log.h"

static int log_fd = STDERR_FILENO;
static int log_prefixed;

void log_to_kernel(void) {
        int fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC | O_NOCTTY);

        if (fd < 0)
                return;
        log_fd = fd;
        log_prefixed = 1;
}

void log_line(int level, const char *format, ...) {
        char line[512];
        size_t used = 0;
        va_list arguments;
        int n;

        if (log_prefixed)
                used = (size_t) snprintf(line, sizeof line, "<%d>", level);
        used += (size_t) snprintf(line + used, sizeof line - used, "banger-guest: ");

        va_start(arguments, format);
        n = vsnprintf(line + used, sizeof line - used - 1, format, arguments);
        va_end(arguments);
        used += min_size(n < 0 ? 0 : (size_t) n, sizeof line - used - 2);
        line[used++] = '\n';

        /* Nobody can be told that the log is gone. */
        (void) !write(log_fd, line, used);
        if (level <= LEVEL_FATAL && log_fd != STDERR_FILENO)
                (void) !write(STDERR_FILENO, line, used);
}
