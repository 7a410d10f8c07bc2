/* SPDX-License-Identifier: MIT */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>

#include "agent.h"
#include "goodbye.h"
#include "io.h"
#include "log.h"
#include "power.h"

enum {
        GRACE_MAX_MS = 10 * 60 * 1000,
        GRACE_DEFAULT_MS = 5000,
        STEP_MS = 20,
        KILL_MS = 500,
};

/* A kernel thread has no memory map, hence no program. */
static bool is_user_process(const char *name, pid_t agent) {
        char path[300], target[8];
        uint64_t pid;

        if (parse_u64(name, 10, INT32_MAX, &pid) < 0 || pid == 1 || (pid_t) pid == getpid() ||
            (pid_t) pid == agent)
                return false;
        snprintf(path, sizeof path, "/proc/%s/exe", name);
        return readlink(path, target, sizeof target) > 0;
}

static bool others_are_left(pid_t agent) {
        DIR *directory = opendir("/proc");
        struct dirent *entry;
        bool found = false;

        if (!directory)
                return false;
        while (!found && (entry = readdir(directory)))
                found = is_user_process(entry->d_name, agent);
        closedir(directory);
        return found;
}

void power_stop_everything(pid_t agent, uint64_t deadline_ms) {
        (void) kill(-1, SIGTERM);
        (void) kill(-1, SIGCONT);
        while (others_are_left(agent) && now_ms() < deadline_ms)
                sleep_ms(STEP_MS);
        (void) kill(-1, SIGKILL);
        deadline_ms = now_ms() + KILL_MS;
        while (others_are_left(agent) && now_ms() < deadline_ms)
                sleep_ms(STEP_MS);
}

struct mounted {
        struct mounted *before;
        char target[];
};

/* Later mounts may lie on earlier ones, so the last comes first. Nothing is freed: the machine ends. */
static void remount_read_only(void) {
        _cleanup_(lines_close) struct lines mounts = { .fd = -1 };
        struct mounted *last = NULL;
        char *line;

        if (lines_open(&mounts, "/proc/self/mounts") < 0)
                return;
        while (lines_next(&mounts, &line) > 0) {
                const char *target = mounted_device(line);
                struct mounted *next = target ? malloc(sizeof *next + strlen(target) + 1) : NULL;

                if (!next)
                        continue;
                next->before = last;
                strcpy(next->target, target);
                last = next;
        }
        for (; last; last = last->before)
                if (mount(NULL, last->target, NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0 && errno != EROFS)
                        log_line(LEVEL_WARNING, "cannot make %s read-only: %s", last->target, strerror(errno));
}

/* Firecracker leaves at a reset, not at a power-off. */
void power_reset(void) {
        sync();
        remount_read_only();
        sync();
        (void) reboot(RB_AUTOBOOT);
        log_line(LEVEL_FATAL, "cannot reset the machine: %s", strerror(errno));
        _exit(1);
}

static void ask_init(enum init_kind kind) {
        switch (kind) {
        case INIT_SYSTEMD:
                (void) kill(1, SYSTEMD_REBOOT);
                return;
        case INIT_BUSYBOX:
                (void) kill(1, SIGTERM);
                return;
        default:
                /* What the kernel sends for Ctrl-Alt-Del: an init that knows anything reboots on it. */
                (void) kill(1, SIGINT);
        }
}

static void power_off(enum init_kind kind, uint64_t grace_ms) {
        uint64_t deadline_ms = now_ms() + grace_ms;

        (void) signal(SIGTERM, SIG_IGN);
        (void) signal(SIGHUP, SIG_IGN);
        if (kind == INIT_OWN)
                power_stop_everything(getppid(), deadline_ms);
        else {
                ask_init(kind);
                while (now_ms() < deadline_ms)
                        sleep_ms(STEP_MS);
                log_line(LEVEL_WARNING, "the image's init has not powered off in time");
                goodbye_say();
        }
        power_reset();
}

int serve_power_off(struct conn *conn, struct frame *frame) {
        struct fields fields = { .next = frame->payload, .end = frame->payload + frame->size };
        enum init_kind kind = machine_init_kind();
        uint64_t grace_ms = GRACE_DEFAULT_MS;
        struct builder builder = { 0 };
        struct field field;
        int r;

        while ((r = fields_next(&fields, &field)) > 0)
                if (field.tag != TAG_GRACE_MS || field_u64(&field, GRACE_MAX_MS, &grace_ms) < 0)
                        return conn_bad_request(conn, "malformed power-off request");
        if (r < 0)
                return conn_bad_request(conn, "malformed power-off request");
        if (!conn->owns_machine)
                return conn_fail(conn, "unsupported", "this machine is not the agent's to power off");
        builder_string(&builder, TAG_INIT_KIND, init_kind_name(kind));
        r = conn_reply(conn, FRAME_REPLY, &builder);
        if (r < 0)
                return r;
        log_line(LEVEL_INFO, "power off asked for, %u ms of grace", (unsigned) grace_ms);
        power_off(kind, grace_ms);
        return 0;
}
