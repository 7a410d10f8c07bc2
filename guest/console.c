/* SPDX-License-Identifier: MIT */
/* banger-console: starts a VM's jailer on the host, keeps what its VMM writes, at most twice LIMIT bytes a stream,
 * and says how the VMM ended.
 *
 * usage: banger-console UID GROUP STARTED EVENTS ENDING LIMIT IN:CURRENT:OLD... -- GROUP PROGRAM [ARGUMENT...]
 *
 * All but UID, LIMIT and the program are numbers of descriptors. Both GROUPs are cgroup.procs: ours, and that of the
 * program, which is in its group before its first instruction. It stays what we are, root; we become UID, whose gid is
 * the same number. The jailer ends at once and leaves its VMM, an orphan: orphans below us become our children,
 * so only we are told how it ends. A byte goes to STARTED when the jailer has ended well, its end is seen there when it
 * has not. One line in ENDING, where nobody else writes, says how the VMM ended, and what EVENTS, its memory.events
 * (-1: none), says then.
 *
 * We open no file but /proc/self/oom_score_adj. When CURRENT is full its content moves to OLD and CURRENT starts anew. What cannot be
 * written is dropped: a full disk must not stop a VM. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FAILED = 126, STREAMS_MAX = 8, FIXED = 7 };

struct stream {
        int in;
        int current;
        int old;
        size_t size;
};

static struct stream streams[STREAMS_MAX];
static int stream_count;
static size_t limit;
static char buffer[16 * 1024];

/* --- logs --- */

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

static void keep(struct stream *stream, const char *data, size_t size) {
        if (stream->size + size > limit)
                start_anew(stream);
        if (stream->size + size <= limit) {
                write_all(stream->current, data, size);
                stream->size += size;
        }
}

/* Returns false at the end of the stream. */
static bool take(struct stream *stream) {
        ssize_t n = read(stream->in, buffer, sizeof buffer);

        if (n > 0)
                keep(stream, buffer, (size_t) n);
        return n > 0 || (n < 0 && (errno == EINTR || errno == EAGAIN));
}

/* What is there now, and no more than is kept: those who wrote have ended, but somebody else may have a descriptor. */
static void drain(struct stream *stream) {
        size_t left = limit;
        ssize_t n;

        while (left > 0 && ((n = read(stream->in, buffer, sizeof buffer)) > 0 || (n < 0 && errno == EINTR)))
                if (n > 0) {
                        keep(stream, buffer, (size_t) n);
                        left -= (size_t) n < left ? (size_t) n : left;
                }
}

static void tell_end(int ending, int status, int events) {
        char line[512];
        ssize_t n;
        size_t size;

        if (WIFSIGNALED(status))
                size = (size_t) sprintf(line, "by signal %d;", WTERMSIG(status));
        else
                size = (size_t) sprintf(line, "with status %d;", WEXITSTATUS(status));
        n = events < 0 ? 0 : pread(events, line + size, sizeof line - size - 1, 0);
        for (ssize_t i = 0; i < n; i++, size++)
                if (line[size] == '\n')
                        line[size] = ' ';
        line[size++] = '\n';
        write_all(ending, line, size);
}

/* --- processes --- */

static int fail(const char *what) {
        dprintf(STDERR_FILENO, "banger-console: %s: %s\n", what, strerror(errno));
        return FAILED;
}

static int become(unsigned long id) {
        if (setgroups(0, NULL) < 0 || setresgid((gid_t) id, (gid_t) id, (gid_t) id) < 0 ||
            setresuid((uid_t) id, (uid_t) id, (uid_t) id) < 0)
                return -1;
        return 0;
}

static int enter(int procs) {
        if (write(procs, "0", 1) != 1)
                return -1;
        return close(procs);
}

/* The helper is spared when the host's memory is short; a VM is not: it is as large as its user made it. */
static int be_spared_no_more(void) {
        int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
        bool is_done = fd >= 0 && write(fd, "0", 1) == 1;

        if (fd >= 0)
                close(fd);
        return is_done ? 0 : -1;
}

static int run(int procs, char **argv) {
        if (be_spared_no_more() < 0)
                return fail("/proc/self/oom_score_adj");
        if (setsid() < 0 || enter(procs) < 0)
                return fail("cannot enter the control group");
        (void) execv(argv[0], argv);
        return fail(argv[0]);
}

/* Reaps all that ended. Returns false when nobody is left; *started is -1 once the end of `jailer` was told. */
static bool reap(pid_t jailer, int *started, int *ret_status) {
        for (;;) {
                int status;
                pid_t pid = waitpid(-1, &status, WNOHANG | __WALL);

                if (pid == 0)
                        return true;
                if (pid < 0)
                        return false;
                if (!WIFEXITED(status) && !WIFSIGNALED(status))
                        continue;
                if (pid != jailer || *started < 0) {
                        *ret_status = status;
                        continue;
                }
                if (status == 0)
                        (void) !write(*started, "0", 1);
                close(*started);
                *started = -1;
        }
}

/* Until every process of the VM has ended. Returns how the VMM did, -1 when there was none. */
static int keep_until_end(pid_t jailer, int children, int started) {
        struct pollfd polled[STREAMS_MAX + 1];
        int status = -1;

        for (int i = 0; i < stream_count; i++)
                polled[i] = (struct pollfd) { .fd = streams[i].in, .events = POLLIN };
        polled[stream_count] = (struct pollfd) { .fd = children, .events = POLLIN };
        while (reap(jailer, &started, &status)) {
                struct signalfd_siginfo info;

                if (poll(polled, (nfds_t) stream_count + 1, -1) < 0)
                        continue;
                for (int i = 0; i < stream_count; i++)
                        if (polled[i].revents != 0 && !take(streams + i))
                                polled[i].fd = -1;
                if (polled[stream_count].revents != 0)
                        (void) !read(children, &info, sizeof info);
        }
        return status;
}

/* --- arguments --- */

static bool parse_number(const char *text, unsigned long *ret) {
        char *end;

        if (*text < '0' || *text > '9')
                return false;
        errno = 0;
        *ret = strtoul(text, &end, 10);
        return errno == 0 && *end == 0 && *ret < UINT32_MAX;
}

/* What the program does not get. */
static bool is_ours(int fd) {
        return fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

static bool parse_fd(const char *text, int *ret) {
        unsigned long number;

        if (!parse_number(text, &number) || number > INT32_MAX)
                return false;
        *ret = (int) number;
        return is_ours(*ret);
}

static bool parse_stream(const char *text, struct stream *ret) {
        off_t end;

        if (sscanf(text, "%d:%d:%d", &ret->in, &ret->current, &ret->old) != 3 || !is_ours(ret->in) ||
            !is_ours(ret->current) || !is_ours(ret->old))
                return false;
        end = lseek(ret->current, 0, SEEK_END);
        ret->size = end < 0 ? 0 : (size_t) end;
        return fcntl(ret->in, F_SETFL, O_NONBLOCK) == 0;
}

int main(int argc, char **argv) {
        int group, started, events = -1, ending, its_group, at = FIXED, children, status;
        unsigned long id, limit_bytes;
        sigset_t child;
        pid_t pid;

        if (argc < FIXED + 1 || !parse_number(argv[1], &id) || id == 0 || !parse_fd(argv[2], &group) ||
            !parse_fd(argv[3], &started) || (strcmp(argv[4], "-1") != 0 && !parse_fd(argv[4], &events)) ||
            !parse_fd(argv[5], &ending) || !parse_number(argv[6], &limit_bytes) || limit_bytes < sizeof buffer)
                return 2;
        limit = limit_bytes;
        for (; at < argc && strcmp(argv[at], "--") != 0; at++)
                if (stream_count == STREAMS_MAX || !parse_stream(argv[at], streams + stream_count++))
                        return 2;
        if (stream_count < 1 || at + 2 >= argc || !parse_fd(argv[at + 1], &its_group))
                return 2;

        if (enter(group) < 0)
                return fail("cannot enter our control group");
        if (prctl(PR_SET_CHILD_SUBREAPER, 1) < 0)
                return fail("cannot become the parent of orphans");
        pid = fork();
        if (pid < 0)
                return fail("cannot fork");
        if (pid == 0)
                _exit(run(its_group, argv + at + 2));
        close(its_group);
        if (become(id) < 0)
                return fail("cannot become the user");
        (void) signal(SIGPIPE, SIG_IGN);
        sigemptyset(&child);
        sigaddset(&child, SIGCHLD);
        if (sigprocmask(SIG_BLOCK, &child, NULL) < 0 || (children = signalfd(-1, &child, SFD_CLOEXEC)) < 0)
                return fail("cannot watch what ends");
        /* The first stream ends when nobody holds its other end. */
        if (dup2(STDIN_FILENO, STDOUT_FILENO) < 0 || dup2(STDIN_FILENO, STDERR_FILENO) < 0)
                return FAILED;
        status = keep_until_end(pid, children, started);
        for (int i = 0; i < stream_count; i++)
                drain(streams + i);
        if (status >= 0)
                tell_end(ending, status, events);
        return 0;
}
