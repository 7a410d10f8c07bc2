/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "agent.h"
#include "goodbye.h"
#include "io.h"
#include "listen.h"
#include "log.h"
#include "machine.h"
#include "pulse.h"

enum {
        CONNECTIONS_MAX = 128,
        PROCESSES_MAX = CONNECTIONS_MAX + 32, /* the rest only says that the agent is busy */
        VSOCK_WAIT_MS = 60 * 1000,
        OPEN_FILES_MAX = 524288,
        OWN_ITEMS = 3,
};

struct agent {
        int listen_fd; /* given: a unix socket of a test; otherwise vsock */
        int notify_fd; /* where the image's init says that it has finished; -1 when it cannot */
        int signal_fd;
        char *name; /* argv[0] */
        bool listen_fd_given;
        bool owns_machine;
        bool init_finished;
        unsigned processes;
        pid_t watch; /* tells of the machine's end */
        struct pulse pulse;
};

static int parse_options(struct agent *agent, int argc, char **argv) {
        for (int i = 2; i < argc; i++) {
                uint64_t value;

                if (strcmp(argv[i], "--own-machine") == 0) {
                        agent->owns_machine = true;
                        continue;
                }
                if (i + 1 >= argc || parse_u64(argv[i + 1], 10, INT32_MAX, &value) < 0)
                        return -EINVAL;
                if (strcmp(argv[i], "--listen-fd") == 0) {
                        agent->listen_fd = (int) value;
                        agent->listen_fd_given = true;
                } else if (strcmp(argv[i], "--pulse-fd") == 0)
                        agent->pulse.listen_fd = (int) value;
                else if (strcmp(argv[i], "--notify-fd") == 0)
                        agent->notify_fd = (int) value;
                else
                        return -EINVAL;
                i++;
        }
        return 0;
}

static void keep_standard_streams(void) {
        int fd;

        do
                fd = open("/dev/null", O_RDWR);
        while (fd >= 0 && fd <= STDERR_FILENO);
        if (fd > STDERR_FILENO)
                close(fd);
}

static void protect_process(bool in_guest) {
        struct rlimit files = { .rlim_cur = 1024, .rlim_max = OPEN_FILES_MAX };

        (void) signal(SIGPIPE, SIG_IGN);
        (void) signal(SIGHUP, SIG_IGN);
        umask(022);
        if (!in_guest)
                return;
        (void) signal(SIGTERM, SIG_IGN);
        (void) signal(SIGINT, SIG_IGN);
        (void) chdir("/");
        (void) setrlimit(RLIMIT_NOFILE, &files);
        if (write_file("/proc/self/oom_score_adj", "-1000", 0) < 0)
                log_line(LEVEL_WARNING, "cannot protect the agent from the out-of-memory killer");
}

static int open_signals(void) {
        sigset_t mask;
        int fd;

        sigemptyset(&mask);
        sigaddset(&mask, SIGCHLD);
        if (sigprocmask(SIG_BLOCK, &mask, NULL) < 0)
                return -errno;
        fd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
        return fd < 0 ? -errno : fd;
}

/* The driver may be a module that the image's own init loads. */
static int wait_vsock(void) {
        uint64_t deadline_ms = now_ms() + VSOCK_WAIT_MS;
        int fd;

        while ((fd = listen_vsock(VSOCK_PORT)) < 0 && now_ms() < deadline_ms)
                sleep_ms(100);
        return fd;
}

static void close_own(struct agent *agent) {
        close(agent->listen_fd);
        close(agent->signal_fd);
        pulse_close(&agent->pulse);
        if (agent->notify_fd >= 0)
                close(agent->notify_fd);
}

static void _Noreturn connection_main(struct agent *agent, int fd) {
        struct conn conn = {
                .fd = fd,
                .name = agent->name,
                .owns_machine = agent->owns_machine,
                .init_finished = agent->init_finished,
        };
        int r;

        close_own(agent);
        (void) signal(SIGTERM, SIG_DFL);
        (void) signal(SIGINT, SIG_DFL);
        r = serve_connection(&conn, agent->processes >= CONNECTIONS_MAX);
        _exit(r < 0 ? 1 : 0);
}

static void accept_connection(struct agent *agent) {
        _cleanup_close_ int fd = accept_host(agent->listen_fd, agent->listen_fd_given);
        pid_t pid;

        if (fd < 0 || agent->processes >= PROCESSES_MAX)
                return;
        pid = fork();
        if (pid < 0) {
                log_line(LEVEL_ERROR, "cannot serve a connection: %s", strerror(errno));
                return;
        }
        if (pid == 0)
                connection_main(agent, take_fd(&fd));
        agent->processes++;
}

static void start_watch(struct agent *agent) {
        agent->watch = fork();
        if (agent->watch != 0)
                return;
        close_own(agent);
        give_up_protection(agent->name);
        goodbye_wait();
}

static void reap(struct agent *agent) {
        struct signalfd_siginfo info;
        int status;
        pid_t pid;

        while (read(agent->signal_fd, &info, sizeof info) > 0)
                ;
        while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
                if (pid == agent->watch) {
                        if (!WIFEXITED(status))
                                goodbye_say(); /* nobody else will */
                        agent->watch = 0; /* the number may be a connection's next */
                        continue;
                }
                agent->processes--;
                if (WIFSIGNALED(status) && WTERMSIG(status) != SIGTERM)
                        log_line(LEVEL_ERROR, "a connection's process died of signal %d", WTERMSIG(status));
        }
}

static int serve(struct agent *agent) {
        for (;;) {
                struct pollfd items[OWN_ITEMS + PULSE_ITEMS] = {
                        { .fd = agent->listen_fd, .events = POLLIN },
                        { .fd = agent->signal_fd, .events = POLLIN },
                        { .fd = agent->notify_fd, .events = POLLIN },
                };

                pulse_items(&agent->pulse, items + OWN_ITEMS);
                if (poll(items, ELEMENTSOF(items), -1) < 0 && errno != EINTR)
                        return -errno;
                if (items[1].revents)
                        reap(agent);
                if (items[2].revents && machine_read_notification(agent->notify_fd)) {
                        agent->init_finished = true;
                        log_line(LEVEL_INFO, "the image's init has finished");
                        close_fdp(&agent->notify_fd);
                }
                pulse_serve(&agent->pulse, items + OWN_ITEMS, agent->listen_fd_given);
                if (items[0].revents)
                        accept_connection(agent);
        }
}

int agent_main(int argc, char **argv) {
        struct agent agent = { .listen_fd = -1, .notify_fd = -1, .name = argv[0] };
        char boot_id[BOOT_ID_SIZE];
        int r;

        pulse_init(&agent.pulse, -1);
        if (parse_options(&agent, argc, argv) < 0) {
                fprintf(stderr, "usage: agent [--listen-fd N [--pulse-fd N] [--own-machine]] [--notify-fd N]\n");
                return 2;
        }
        keep_standard_streams();
        if (!agent.listen_fd_given) {
                agent.owns_machine = true;
                log_to_kernel();
        }
        protect_process(!agent.listen_fd_given);
        agent.signal_fd = open_signals();
        if (!agent.listen_fd_given)
                agent.listen_fd = wait_vsock();
        if (agent.listen_fd < 0 || agent.signal_fd < 0) {
                log_line(LEVEL_ERROR, "the agent cannot listen: %s", strerror(-agent.listen_fd));
                return 1;
        }
        if (!agent.listen_fd_given)
                agent.pulse.listen_fd = listen_vsock(PULSE_PORT);
        if (agent.pulse.listen_fd >= 0)
                (void) fcntl(agent.pulse.listen_fd, F_SETFD, FD_CLOEXEC);
        (void) fcntl(agent.listen_fd, F_SETFD, FD_CLOEXEC);
        if (agent.notify_fd >= 0)
                (void) fcntl(agent.notify_fd, F_SETFD, FD_CLOEXEC);
        machine_boot_id(boot_id);
        log_line(LEVEL_INFO, "agent %s listening on port %d, boot id %s", BANGER_VERSION, VSOCK_PORT, boot_id);
        if (!agent.listen_fd_given)
                start_watch(&agent);
        r = serve(&agent);
        log_line(LEVEL_ERROR, "the agent stops: %s", strerror(-r));
        return 1;
}
