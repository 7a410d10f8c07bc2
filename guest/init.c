/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "config.h"
#include "init.h"
#include "io.h"
#include "log.h"
#include "net.h"
#include "power.h"
#include "systemd.h"

#define HOSTNAME "/etc/hostname"
#define NOTIFY_SOCKET "/run/banger-notify"
/* At the end systemd kills all but those named with an '@': systemd.io/ROOT_STORAGE_DAEMONS. */
#define AGENT_NAME "@banger-guest"

enum { DEVICE_LIMIT_MS = 2000, WAIT_STEP_MS = 2, RESPAWN_MS = 200 };

static const struct {
        const char *type, *target, *options;
        unsigned long flags;
} file_systems[] = {
        { "proc", "/proc", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC },
        { "sysfs", "/sys", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC },
        { "devtmpfs", "/dev", "mode=755", MS_NOSUID },
        { "devpts", "/dev/pts", "mode=620,gid=5,ptmxmode=666", MS_NOSUID | MS_NOEXEC },
        { "tmpfs", "/dev/shm", "mode=1777", MS_NOSUID | MS_NODEV },
        { "tmpfs", "/run", "mode=755", MS_NOSUID | MS_NODEV },
        { "cgroup2", "/sys/fs/cgroup", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC },
};

/* The kernel's /dev has no names of a process's own streams; shells and scripts expect them. */
static const struct {
        const char *target, *path;
} links[] = {
        { "/proc/self/fd", "/dev/fd" },
        { "/proc/self/fd/0", "/dev/stdin" },
        { "/proc/self/fd/1", "/dev/stdout" },
        { "/proc/self/fd/2", "/dev/stderr" },
};

/* In this order; the image's own comes before a distribution's habit. */
static const char *const inits[] = {
        "/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd", "/etc/init", "/bin/init",
};

void init_mount_kernel_file_systems(void) {
        for (size_t i = 0; i < ELEMENTSOF(file_systems); i++) {
                (void) mkdir(file_systems[i].target, 0755);
                if (mount(file_systems[i].type, file_systems[i].target, file_systems[i].type, file_systems[i].flags,
                          file_systems[i].options) < 0 &&
                    errno != EBUSY)
                        log_line(LEVEL_WARNING, "cannot mount %s: %s", file_systems[i].target, strerror(errno));
        }
        for (size_t i = 0; i < ELEMENTSOF(links); i++)
                if (symlink(links[i].target, links[i].path) < 0 && errno != EEXIST)
                        log_line(LEVEL_WARNING, "cannot make %s: %s", links[i].path, strerror(errno));
}

int init_wait_for(const char *path, unsigned limit_ms) {
        uint64_t deadline_ms = now_ms() + limit_ms;

        while (access(path, F_OK) < 0) {
                if (now_ms() >= deadline_ms)
                        return -ETIMEDOUT;
                sleep_ms(WAIT_STEP_MS);
        }
        return 0;
}

static void mount_drive(const struct mount_config *drive) {
        int r = init_wait_for(drive->device, DEVICE_LIMIT_MS);

        if (r >= 0) {
                (void) make_directories(drive->target, 0755);
                r = mount(drive->device, drive->target, drive->type, MS_NODEV, NULL) < 0 ? -errno : 0;
        }
        if (r < 0)
                log_line(LEVEL_ERROR, "cannot mount %s at %s: %s", drive->device, drive->target, strerror(-r));
}

static void take_ip_of_kernel(struct config *config, const struct cmdline *words) {
        const char *value = cmdline_value(words, "ip");
        char text[256];

        if (!value || strlen(value) >= sizeof text)
                return;
        memcpy(text, value, strlen(value) + 1);
        config->ip_given = ip_config_parse(text, &config->ip) >= 0;
}

/* An image's own init takes the name from the file. What is there in its place is replaced, never followed. */
static void set_hostname(const char *name) {
        char line[80];

        if (sethostname(name, strlen(name)) < 0)
                log_line(LEVEL_WARNING, "cannot set the host name: %s", strerror(errno));
        snprintf(line, sizeof line, "%s\n", name);
        (void) mkdir("/etc", 0755);
        (void) unlink(HOSTNAME);
        if (write_file(HOSTNAME, line, O_CREAT | O_EXCL) < 0 && errno != EROFS)
                log_line(LEVEL_WARNING, "cannot write " HOSTNAME ": %s", strerror(errno));
}

static void set_up(const struct cmdline *words) {
        static struct config config;

        config_load(&config, CONFIG_PATH, words);
        if (config.bad_lines > 0)
                log_line(LEVEL_WARNING, "%u lines of my configuration mean nothing to me, the first: %s",
                         config.bad_lines, config.first_bad);
        take_ip_of_kernel(&config, words);
        if (*config.hostname)
                set_hostname(config.hostname);
        for (size_t i = 0; i < config.mount_count; i++)
                mount_drive(&config.mounts[i]);
        net_loopback_up();
        if (config.ip_given) {
                net_configure(&config.ip);
                for (size_t i = 0; i < ELEMENTSOF(config.ip.dns); i++)
                        if (*config.ip.dns[i])
                                config_add_dns(&config, config.ip.dns[i]);
        }
        if (config.ip6_given)
                net_configure6(*config.ip.device ? config.ip.device : "eth0", &config.ip6);
        net_write_resolver(&config);
        net_write_hosts();
}

static void open_standard_streams(void) {
        int fd = open("/dev/console", O_RDWR | O_NOCTTY);

        if (fd < 0)
                fd = open("/dev/null", O_RDWR);
        for (int i = 0; fd >= 0 && i <= STDERR_FILENO; i++)
                if (fd != i && fcntl(i, F_GETFD) < 0)
                        (void) dup2(fd, i);
        if (fd > STDERR_FILENO)
                close(fd);
}

/* systemd sends READY=1 to it once the default target is reached. */
static int open_notify_socket(void) {
        struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = NOTIFY_SOCKET };
        int fd = socket(AF_UNIX, SOCK_DGRAM, 0), on = 1;

        if (fd < 0)
                return -1;
        (void) unlink(NOTIFY_SOCKET);
        if (setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0 ||
            bind(fd, (struct sockaddr *) &address, sizeof address) < 0)
                close_fdp(&fd);
        return fd;
}

static pid_t start_agent(int notify_fd) {
        char number[16];
        pid_t pid = fork();

        if (pid != 0) {
                if (pid < 0)
                        log_line(LEVEL_FATAL, "cannot start the agent: %s", strerror(errno));
                return pid;
        }
        (void) setsid();
        snprintf(number, sizeof number, "%d", notify_fd);
        if (notify_fd >= 0)
                (void) execl("/proc/self/exe", AGENT_NAME, "agent", "--notify-fd", number, NULL);
        else
                (void) execl("/proc/self/exe", AGENT_NAME, "agent", NULL);
        log_line(LEVEL_FATAL, "cannot execute the agent: %s", strerror(errno));
        _exit(1);
}

static bool is_ourselves(const char *path) {
        struct stat one, other;

        return stat(path, &one) == 0 && stat("/proc/self/exe", &other) == 0 && one.st_dev == other.st_dev &&
               one.st_ino == other.st_ino;
}

static void become_init_of_image(void) {
        (void) setenv("NOTIFY_SOCKET", NOTIFY_SOCKET, 1);
        for (size_t i = 0; i < ELEMENTSOF(inits); i++) {
                if (access(inits[i], X_OK) < 0 || is_ourselves(inits[i]))
                        continue;
                if (systemd_is(inits[i]))
                        systemd_prepare();
                log_line(LEVEL_INFO, "handing over to %s", inits[i]);
                (void) execl(inits[i], inits[i], NULL);
                log_line(LEVEL_ERROR, "cannot execute %s: %s", inits[i], strerror(errno));
        }
        (void) unsetenv("NOTIFY_SOCKET");
}

/* What programs that mean to end the machine send to process 1. */
static bool asks_for_the_end(int number) {
        switch (number) {
        case SIGTERM: /* busybox reboot */
        case SIGINT:  /* Ctrl-Alt-Del */
        case SIGUSR1: /* busybox halt */
        case SIGUSR2: /* busybox poweroff */
        case SIGPWR:
        case SYSTEMD_HALT:
        case SYSTEMD_POWER_OFF:
        case SYSTEMD_REBOOT:
                return true;
        default:
                return false;
        }
}

/* Reaps whatever is left to it, and starts the agent again should it die. */
static void _Noreturn stay_as_init(pid_t agent) {
        sigset_t all;

        sigfillset(&all);
        (void) sigprocmask(SIG_BLOCK, &all, NULL);
        log_line(LEVEL_INFO, "no init in the image: staying");
        for (;;) {
                pid_t gone;
                int number;

                while ((gone = waitpid(-1, NULL, WNOHANG)) > 0)
                        if (gone == agent) {
                                log_line(LEVEL_ERROR, "the agent died; starting it again");
                                do {
                                        sleep_ms(RESPAWN_MS);
                                        (void) sigprocmask(SIG_UNBLOCK, &all, NULL);
                                        agent = start_agent(-1);
                                        (void) sigprocmask(SIG_BLOCK, &all, NULL);
                                } while (agent < 0); /* there may be memory for it later */
                        }
                if (sigwait(&all, &number) == 0 && asks_for_the_end(number)) {
                        power_stop_everything(agent, now_ms() + DEVICE_LIMIT_MS);
                        power_reset();
                }
        }
}

int init_main(void) {
        static struct cmdline words;
        const char *choice;
        int notify_fd;
        pid_t agent;

        umask(022);
        init_mount_kernel_file_systems();
        open_standard_streams();
        log_to_kernel();
        cmdline_load(&words);
        if (access(INITRAMFS_MODULES, F_OK) == 0) {
                (void) initramfs_main();
                power_reset();
        }
        set_up(&words);
        notify_fd = open_notify_socket();
        agent = start_agent(notify_fd);
        close_fdp(&notify_fd);
        choice = cmdline_value(&words, "banger.init");
        if (!choice || strcmp(choice, "none") != 0)
                become_init_of_image();
        stay_as_init(agent);
}
