/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "io.h"

uint64_t now_ms(void) {
        struct timespec now;

        clock_gettime(CLOCK_BOOTTIME, &now);
        return (uint64_t) now.tv_sec * 1000 + (uint64_t) now.tv_nsec / 1000000;
}

void sleep_ms(unsigned ms) {
        struct timespec left = { .tv_sec = ms / 1000, .tv_nsec = (long) (ms % 1000) * 1000000 };

        while (nanosleep(&left, &left) < 0 && errno == EINTR)
                ;
}

int poll_timeout(uint64_t deadline_ms) {
        uint64_t now = now_ms();

        if (deadline_ms == UINT64_MAX)
                return -1;
        if (deadline_ms <= now)
                return 0;
        return deadline_ms - now > INT_MAX ? INT_MAX : (int) (deadline_ms - now);
}

int wait_fd(int fd, short events, uint64_t deadline_ms) {
        for (;;) {
                struct pollfd item = { .fd = fd, .events = events };
                int n = poll(&item, 1, poll_timeout(deadline_ms));

                if (n > 0)
                        return 0;
                if (n == 0)
                        return -ETIMEDOUT;
                if (errno != EINTR)
                        return -errno;
        }
}

int write_all(int fd, const void *data, size_t size) {
        const char *p = data;

        while (size > 0) {
                ssize_t n = write(fd, p, size);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return -errno;
                p += n;
                size -= (size_t) n;
        }
        return 0;
}

/* Reads at most size - 1 bytes and terminates them. Returns how many, or a negative errno. */
ssize_t read_file(const char *path, char *buffer, size_t size) {
        _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
        size_t used = 0;

        if (fd < 0)
                return -errno;
        while (used < size - 1) {
                ssize_t n = read(fd, buffer + used, size - 1 - used);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return -errno;
                if (n == 0)
                        break;
                used += (size_t) n;
        }
        buffer[used] = 0;
        return (ssize_t) used;
}

int write_file(const char *path, const char *text, int flags) {
        _cleanup_close_ int fd = open(path, O_WRONLY | O_CLOEXEC | O_NOCTTY | flags, 0644);

        if (fd < 0)
                return -errno;
        return write_all(fd, text, strlen(text));
}

int make_directories(const char *path, mode_t mode) {
        char buffer[PATH_MAX];
        size_t length = strlen(path);

        if (length == 0 || length >= sizeof buffer)
                return -ENAMETOOLONG;
        memcpy(buffer, path, length + 1);
        for (char *p = buffer + 1; *p; p++) {
                if (*p != '/')
                        continue;
                *p = 0;
                if (mkdir(buffer, 0755) < 0 && errno != EEXIST)
                        return -errno;
                *p = '/';
        }
        if (mkdir(buffer, mode) < 0 && errno != EEXIST)
                return -errno;
        return 0;
}

bool is_mount_point(const char *path) {
        char parent[PATH_MAX];
        struct stat self, above;
        size_t length = strlen(path);

        if (length + sizeof "/.." > sizeof parent)
                return false;
        memcpy(parent, path, length);
        memcpy(parent + length, "/..", sizeof "/..");
        if (stat(path, &self) < 0 || stat(parent, &above) < 0)
                return false;
        return self.st_dev != above.st_dev || self.st_ino == above.st_ino;
}

int parse_u64(const char *text, int base, uint64_t max, uint64_t *ret) {
        unsigned long long value;
        char *end;

        if (*text < '0' || (*text > '9' && base <= 10))
                return -EINVAL;
        errno = 0;
        value = strtoull(text, &end, base);
        if (errno != 0 || *end != 0 || value > max)
                return -EINVAL;
        *ret = value;
        return 0;
}

/* Cuts the next non-empty token off *cursor; NULL when there is none. */
char *next_token(char **cursor, const char *separators) {
        char *token = *cursor + strspn(*cursor, separators);
        char *end = token + strcspn(token, separators);

        if (*token == 0)
                return NULL;
        *cursor = *end ? end + 1 : end;
        *end = 0;
        return token;
}

/* The kernel writes blanks and backslashes as a backslash and three octal digits. */
static void unescape(char *text) {
        char *out = text;

        while (*text) {
                unsigned value = (unsigned char) *text;
                bool is_octal = *text == '\\' && strspn(text + 1, "01234567") >= 3;

                if (is_octal)
                        value = (unsigned) ((text[1] - '0') << 6 | (text[2] - '0') << 3 | (text[3] - '0'));
                text += is_octal ? 4 : 1;
                *out++ = (char) value;
        }
        *out = 0;
}

char *mounted_device(char *line) {
        char *source = next_token(&line, " "), *target = next_token(&line, " ");

        if (!source || !target || strncmp(source, "/dev/", 5) != 0)
                return NULL;
        unescape(target);
        return target;
}

int lines_open(struct lines *lines, const char *path) {
        lines->fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
        if (lines->fd < 0)
                return -errno;
        lines->start = lines->end = 0;
        lines->skipping = lines->at_end = false;
        return 0;
}

static int lines_fill(struct lines *lines) {
        ssize_t n;

        if (lines->start > 0) {
                memmove(lines->buffer, lines->buffer + lines->start, lines->end - lines->start);
                lines->end -= lines->start;
                lines->start = 0;
        }
        if (lines->end >= sizeof lines->buffer - 1) {
                lines->skipping = true;
                lines->end = 0;
        }
        do
                n = read(lines->fd, lines->buffer + lines->end, sizeof lines->buffer - 1 - lines->end);
        while (n < 0 && errno == EINTR);
        if (n < 0)
                return -errno;
        if (n == 0)
                lines->at_end = true;
        lines->end += (size_t) n;
        return 0;
}

/* Returns 1 with a line, 0 at the end, or a negative errno. */
int lines_next(struct lines *lines, char **ret_line) {
        for (;;) {
                char *start = lines->buffer + lines->start;
                char *newline = memchr(start, '\n', lines->end - lines->start);
                bool wanted;
                int r;

                if (!newline && lines->at_end && lines->end > lines->start)
                        newline = lines->buffer + lines->end++;
                if (!newline && lines->at_end)
                        return 0;
                if (!newline) {
                        r = lines_fill(lines);
                        if (r < 0)
                                return r;
                        continue;
                }
                *newline = 0;
                lines->start = (size_t) (newline - lines->buffer) + 1;
                wanted = !lines->skipping;
                lines->skipping = false;
                if (wanted) {
                        *ret_line = start;
                        return 1;
                }
        }
}

void lines_close(struct lines *lines) {
        close_fdp(&lines->fd);
}
