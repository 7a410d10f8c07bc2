/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>

#include "exec.h"
#include "io.h"

#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif

enum {
        TTY_GROUP = 5, /* what every distribution gives the group tty */
        STATUS_NOT_EXECUTABLE = 126,
        STATUS_NOT_FOUND = 127,
};

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

/* The child's ends. */
struct stdio {
        int input, output, error;
};

static void close_stdio(struct stdio *stdio) {
        close_fdp(&stdio->input);
        close_fdp(&stdio->output);
        close_fdp(&stdio->error);
}

static int open_pipe(int *ret_read, int *ret_write) {
        int pair[2];

        if (pipe2(pair, O_CLOEXEC) < 0)
                return -errno;
        *ret_read = pair[0];
        *ret_write = pair[1];
        return 0;
}

/* The pipe is the user's, who may open it by its name: `>/dev/stderr`. */
static int open_pipe_for(const struct user *user, int *ret_read, int *ret_write) {
        int r = open_pipe(ret_read, ret_write);

        if (r < 0 || geteuid() != 0)
                return r;
        return fchown(*ret_read, user->uid, user->gid) < 0 ? -errno : 0;
}

static int set_nonblocking(int fd) {
        return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) < 0 ? -errno : 0;
}

static int open_pipes(const struct exec_request *request, const struct user *user, struct exec_process *process,
                      struct stdio *child) {
        int r;

        if (request->stdin_open)
                r = open_pipe_for(user, &child->input, &process->input);
        else
                r = (child->input = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0 ? -errno : 0;
        if (r < 0)
                return r;
        r = open_pipe_for(user, &process->output[0], &child->output);
        if (r < 0)
                return r;
        r = open_pipe_for(user, &process->output[1], &child->error);
        if (r < 0)
                return r;
        if (process->input >= 0 && (r = set_nonblocking(process->input)) < 0)
                return r;
        r = set_nonblocking(process->output[0]);
        return r < 0 ? r : set_nonblocking(process->output[1]);
}

/* As ssh does it: what is erased is a character, not a byte of it. */
static int expect_utf8(int fd) {
        struct termios modes;

        if (tcgetattr(fd, &modes) < 0)
                return -errno;
        modes.c_iflag |= IUTF8;
        return tcsetattr(fd, TCSANOW, &modes) < 0 ? -errno : 0;
}

static int open_tty(const struct exec_request *request, const struct user *user, struct exec_process *process,
                    struct stdio *child) {
        struct winsize size = {
                .ws_row = request->rows ? request->rows : 24,
                .ws_col = request->columns ? request->columns : 80,
        };
        int unlocked = 0, r;

        process->output[0] = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
        if (process->output[0] < 0)
                return -errno;
        if (ioctl(process->output[0], TIOCSPTLCK, &unlocked) < 0)
                return -errno;
        child->input = ioctl(process->output[0], TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
        if (child->input < 0)
                return -errno;
        if (ioctl(child->input, TIOCSWINSZ, &size) < 0)
                return -errno;
        r = expect_utf8(child->input);
        if (r < 0)
                return r;
        if (geteuid() == 0 && (fchown(child->input, user->uid, TTY_GROUP) < 0 || fchmod(child->input, 0620) < 0))
                return -errno;
        child->output = fcntl(child->input, F_DUPFD_CLOEXEC, 0);
        child->error = fcntl(child->input, F_DUPFD_CLOEXEC, 0);
        if (child->output < 0 || child->error < 0)
                return -errno;
        r = set_nonblocking(process->output[0]);
        if (r < 0 || !request->stdin_open)
                return r;
        process->input = fcntl(process->output[0], F_DUPFD_CLOEXEC, 0);
        return process->input < 0 ? -errno : 0;
}

/* Later entries win, so the request's own come last; execve() keeps doubles, hence the check. */
static bool is_overridden(const struct exec_request *request, const char *entry) {
        size_t length = (size_t) (strchr(entry, '=') - entry) + 1;

        for (size_t i = 0; i < request->environment_count; i++)
                if (strncmp(request->environment[i], entry, length) == 0)
                        return true;
        return false;
}

struct environment {
        char home[1100], user[300], logname[300], shell[300];
        const char *fixed[3];
        char **list;
};

static int build_environment(const struct exec_request *request, const struct user *user, struct environment *env) {
        size_t n = 0;

        snprintf(env->home, sizeof env->home, "HOME=%s", user->home);
        snprintf(env->user, sizeof env->user, "USER=%s", user->name);
        snprintf(env->logname, sizeof env->logname, "LOGNAME=%s", user->name);
        snprintf(env->shell, sizeof env->shell, "SHELL=%s", user->shell);
        char *defaults[] = {
                env->home,
                env->user,
                env->logname,
                env->shell,
                (char *) "PATH=" DEFAULT_PATH,
                (char *) "LANG=C.UTF-8",
                (char *) (request->tty ? "TERM=xterm" : "TERM=dumb"),
        };

        env->list = calloc(request->environment_count + ELEMENTSOF(defaults) + 1, sizeof *env->list);
        if (!env->list)
                return -ENOMEM;
        for (size_t i = 0; i < ELEMENTSOF(defaults); i++)
                if (!is_overridden(request, defaults[i]))
                        env->list[n++] = defaults[i];
        for (size_t i = 0; i < request->environment_count; i++)
                env->list[n++] = request->environment[i];
        return 0;
}

static const char *find_path(char **environment) {
        for (; *environment; environment++)
                if (strncmp(*environment, "PATH=", 5) == 0)
                        return *environment + 5;
        return "";
}

/* Returns the errno to report: a file that is there but cannot be run says more than one that is not there. */
static int execute(char **arguments, char **environment) {
        const char *path = find_path(environment);
        int error = ENOENT;

        if (strchr(arguments[0], '/')) {
                execve(arguments[0], arguments, environment);
                return errno;
        }
        while (*path) {
                size_t length = strcspn(path, ":");
                char file[PATH_MAX];

                if (length > 0 && length < sizeof file &&
                    (size_t) snprintf(file, sizeof file, "%.*s/%s", (int) length, path, arguments[0]) < sizeof file) {
                        execve(file, arguments, environment);
                        if (errno != ENOENT && errno != ENOTDIR)
                                error = errno;
                }
                path += length + (path[length] == ':');
        }
        return error;
}

static void reset_signals(void) {
        struct sigaction action = { .sa_handler = SIG_DFL };
        sigset_t none;

        for (int n = 1; n < 65; n++)
                (void) sigaction(n, &action, NULL);
        sigemptyset(&none);
        (void) sigprocmask(SIG_SETMASK, &none, NULL);
}

static void _Noreturn refuse(int status_fd, const char *what) {
        struct exec_failure failure = { .error = errno };

        snprintf(failure.what, sizeof failure.what, "%s", what);
        (void) !write(status_fd, &failure, sizeof failure);
        _exit(STATUS_NOT_EXECUTABLE);
}

static int take_stdio(const struct stdio *stdio) {
        if (dup2(stdio->input, STDIN_FILENO) < 0 || dup2(stdio->output, STDOUT_FILENO) < 0 ||
            dup2(stdio->error, STDERR_FILENO) < 0)
                return -errno;
        return 0;
}

static int become_user(const struct user *user) {
        if (geteuid() != 0 && geteuid() == user->uid)
                return 0;
        if (setgroups(user->group_count, user->groups) < 0 || setresgid(user->gid, user->gid, user->gid) < 0 ||
            setresuid(user->uid, user->uid, user->uid) < 0)
                return -errno;
        return 0;
}

static int enter_directory(const struct exec_request *request, const struct user *user) {
        if (request->directory)
                return chdir(request->directory);
        return chdir(user->home) < 0 ? chdir("/") : 0;
}

static void _Noreturn child_main(const struct exec_request *request, const struct user *user,
                                 const struct stdio *stdio, int status_fd) {
        struct environment environment;
        int error;

        reset_signals();
        if (setsid() < 0)
                refuse(status_fd, "new session");
        if (request->tty && ioctl(stdio->input, TIOCSCTTY, 0) < 0)
                refuse(status_fd, "controlling terminal");
        if (take_stdio(stdio) < 0)
                refuse(status_fd, "standard streams");
        /* Without /proc there is no adjustment to take back either. */
        (void) write_file("/proc/self/oom_score_adj", "0", 0);
        umask(022);
        if (become_user(user) < 0)
                refuse(status_fd, "user");
        if (enter_directory(request, user) < 0)
                refuse(status_fd, "working directory");
        if (build_environment(request, user, &environment) < 0)
                refuse(status_fd, "environment");
        (void) syscall(SYS_close_range, 3U, ~0U, 4U /* CLOSE_RANGE_CLOEXEC */);

        error = execute(request->arguments, environment.list);
        dprintf(STDERR_FILENO,
                "banger: %s: %s\n",
                request->arguments[0],
                error == ENOENT && !strchr(request->arguments[0], '/') ? "command not found" : strerror(error));
        _exit(error == ENOENT || error == ENOTDIR ? STATUS_NOT_FOUND : STATUS_NOT_EXECUTABLE);
}

int exec_spawn(const struct exec_request *request, const struct user *user, struct exec_process *ret) {
        _cleanup_(close_stdio) struct stdio child = { -1, -1, -1 };
        _cleanup_close_ int status_write = -1;
        int r;

        r = request->tty ? open_tty(request, user, ret, &child) : open_pipes(request, user, ret, &child);
        if (r < 0)
                return r;
        r = open_pipe(&ret->status, &status_write);
        if (r < 0)
                return r;
        ret->pid = fork();
        if (ret->pid < 0)
                return -errno;
        if (ret->pid == 0)
                child_main(request, user, &child, status_write);
        return 0;
}
