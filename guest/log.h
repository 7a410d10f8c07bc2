/* SPDX-License-Identifier: MIT */
/* One line at a time to the kernel log, or to standard error where the machine is not ours. */
#pragma once

#include "macro.h"

enum { LEVEL_FATAL = 2, LEVEL_ERROR = 3, LEVEL_WARNING = 4, LEVEL_INFO = 6 };

void log_to_kernel(void);
void log_line(int level, const char *format, ...) _printf_(2, 3);
