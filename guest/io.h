/* SPDX-License-Identifier: MIT */
/* Files, lines and waiting. Functions return 0 or a negative errno unless they say otherwise. */
#pragma once

#include <stdbool.h>
#include <sys/types.h>

#include "macro.h"

uint64_t now_ms(void);
void sleep_ms(unsigned ms);
int poll_timeout(uint64_t deadline_ms);
int wait_fd(int fd, short events, uint64_t deadline_ms);

int write_all(int fd, const void *data, size_t size);
ssize_t read_file(const char *path, char *buffer, size_t size);
int write_file(const char *path, const char *text, int flags);
int make_directories(const char *path, mode_t mode);
bool is_mount_point(const char *path);

/* Where a line of /proc/self/mounts has a device mounted, as it is; NULL for other mounts. Changes the line. */
char *mounted_device(char *line);

int parse_u64(const char *text, int base, uint64_t max, uint64_t *ret);
char *next_token(char **cursor, const char *separators);

/* Reads a text file line by line; a line longer than the buffer is left out. */
struct lines {
        int fd;
        size_t start, end;
        bool skipping, at_end;
        char buffer[4096];
};

int lines_open(struct lines *lines, const char *path);
int lines_next(struct lines *lines, char **ret_line);
void lines_close(struct lines *lines);
