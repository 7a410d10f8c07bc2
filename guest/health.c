/* SPDX-License-Identifier: MIT */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <time.h>

#include "agent.h"
#include "config.h"
#include "io.h"
#include "machine.h"

enum { LOAD_SHIFT = 16 };

static uint64_t parse_kib(char *text) {
        char *token = next_token(&text, " \t");
        uint64_t kib;

        if (!token || parse_u64(token, 10, UINT64_MAX / 1024, &kib) < 0)
                return 0;
        return kib * 1024;
}

/* The value of a "Name:   123 kB" line; 0 when there is none. */
static uint64_t read_kib(const char *path, const char *name) {
        _cleanup_(lines_close) struct lines lines;
        size_t length = strlen(name);
        char *line;

        if (lines_open(&lines, path) < 0)
                return 0;
        while (lines_next(&lines, &line) > 0)
                if (strncmp(line, name, length) == 0 && line[length] == ':')
                        return parse_kib(line + length + 1);
        return 0;
}

static void add_agent(struct builder *builder) {
        /* The agent is our parent: this process serves one connection only. */
        pid_t agent = getppid();
        char path[64] = "/proc/self/status";

        builder_u64(builder, TAG_AGENT_PID, (uint64_t) agent);
        snprintf(path, sizeof path, "/proc/%d/status", (int) agent);
        builder_u64(builder, TAG_RSS_BYTES, read_kib(path, "VmRSS"));
}

static void add_init(struct builder *builder, bool finished) {
        enum init_kind kind = machine_init_kind();

        builder_string(builder, TAG_INIT_KIND, init_kind_name(kind));
        if (kind == INIT_OWN)
                builder_u64(builder, TAG_INIT_FINISHED, 1);
        else if (kind == INIT_SYSTEMD)
                builder_u64(builder, TAG_INIT_FINISHED, finished);
}

static void add_load(struct builder *builder) {
        struct sysinfo info;

        if (sysinfo(&info) < 0)
                return;
        for (int i = 0; i < 3; i++)
                builder_u64(builder, TAG_LOAD_MILLI, ((uint64_t) info.loads[i] * 1000) >> LOAD_SHIFT);
}

static void add_failed_mounts(struct builder *builder) {
        struct cmdline words;
        struct config config;

        cmdline_load(&words);
        config_load(&config, CONFIG_PATH, &words);
        for (size_t i = 0; i < config.mount_count; i++)
                if (!is_mount_point(config.mounts[i].target))
                        builder_string(builder, TAG_FAILED_MOUNT, config.mounts[i].target);
}

int serve_health(struct conn *conn, struct frame *frame) {
        struct builder builder = { 0 };
        char boot_id[BOOT_ID_SIZE];
        struct timespec now;

        if (frame->size > 0)
                return conn_bad_request(conn, "health takes no fields");
        machine_boot_id(boot_id);
        clock_gettime(CLOCK_REALTIME, &now);
        builder_string(&builder, TAG_BOOT_ID, boot_id);
        builder_u64(&builder, TAG_UPTIME_MS, now_ms());
        builder_string(&builder, TAG_AGENT_VERSION, BANGER_VERSION);
        builder_u64(&builder, TAG_REALTIME_NS, (uint64_t) now.tv_sec * 1000000000 + (uint64_t) now.tv_nsec);
        builder_u64(&builder, TAG_MEMORY_TOTAL_BYTES, read_kib("/proc/meminfo", "MemTotal"));
        builder_u64(&builder, TAG_MEMORY_AVAILABLE_BYTES, read_kib("/proc/meminfo", "MemAvailable"));
        add_agent(&builder);
        add_init(&builder, conn->init_finished);
        add_load(&builder);
        if (conn->owns_machine)
                add_failed_mounts(&builder);
        return conn_reply(conn, FRAME_REPLY, &builder);
}
