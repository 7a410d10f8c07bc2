/* SPDX-License-Identifier: MIT */
/* banger-console: runs on the host as a VM's uid and keeps what its VMM writes, at most twice LIMIT bytes a stream.
 *
 * usage: banger-console LIMIT IN:CURRENT:OLD...    (descriptor numbers; the first IN ends the program at its end)
 *
 * It names no file and opens none. When CURRENT is full its content moves to OLD and CURRENT starts anew. What
 * cannot be written is dropped: a full disk must not stop a VM. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define STREAMS_MAX 8

struct stream {
        int in;
        int current;
        int old;
        size_t size;
};

static char buffer[16 * 1024];

static void write_all(int fd, const char *data, size_t size) {
        while (size > 0) {
                ssize_t n = write(fd, data, size);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n <= 0)
                        return;
                data += n;
                size -= (size_t) n;
        }
}

static void start_anew(struct stream *stream) {
        static char moved[16 * 1024];
        off_t at = 0;
        ssize_t n;

        if (ftruncate(stream->old, 0) < 0 || lseek(stream->old, 0, SEEK_SET) < 0)
                return;
        while ((n = pread(stream->current, moved, sizeof moved, at)) > 0) {
                write_all(stream->old, moved, (size_t) n);
                at += n;
        }
        if (ftruncate(stream->current, 0) == 0 && lseek(stream->current, 0, SEEK_SET) == 0)
                stream->size = 0;
}

/* Returns false at the end of the stream. */
static bool take(struct stream *stream, size_t limit) {
        ssize_t n = read(stream->in, buffer, sizeof buffer);

        if (n < 0)
                return errno == EINTR || errno == EAGAIN;
        if (n == 0)
                return false;
        if (stream->size + (size_t) n > limit)
                start_anew(stream);
        if (stream->size + (size_t) n <= limit) {
                write_all(stream->current, buffer, (size_t) n);
                stream->size += (size_t) n;
        }
        return true;
}

static bool parse(const char *text, struct stream *ret) {
        off_t end;

        if (sscanf(text, "%d:%d:%d", &ret->in, &ret->current, &ret->old) != 3)
                return false;
        end = lseek(ret->current, 0, SEEK_END);
        ret->size = end < 0 ? 0 : (size_t) end;
        return fcntl(ret->in, F_SETFL, O_NONBLOCK) == 0;
}

int main(int argc, char **argv) {
        struct stream streams[STREAMS_MAX];
        struct pollfd polled[STREAMS_MAX];
        int count = argc - 2;
        size_t limit = argc > 2 ? strtoul(argv[1], NULL, 10) : 0;

        if (count < 1 || count > STREAMS_MAX || limit < sizeof buffer)
                return 2;
        for (int i = 0; i < count; i++) {
                if (!parse(argv[2 + i], streams + i))
                        return 2;
                polled[i] = (struct pollfd) { .fd = streams[i].in, .events = POLLIN };
        }
        while (polled[0].fd >= 0) {
                if (poll(polled, (nfds_t) count, -1) < 0 && errno != EINTR)
                        return 1;
                /* The first stream is last: when it ends, the others have been read as far as they went. */
                for (int i = count - 1; i >= 0; i--)
                        if (polled[i].revents != 0 && !take(streams + i, limit))
                                polled[i].fd = -1;
        }
        for (int i = 1; i < count; i++)
                if (polled[i].fd >= 0)
                        (void) take(streams + i, limit);
        return 0;
}
