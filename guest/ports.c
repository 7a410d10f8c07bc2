/* SPDX-License-Identifier: MIT */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent.h"
#include "io.h"
#include "ports.h"

enum {
        PORTS_MAX = 4096,
        STATE_TCP_LISTEN = 0x0a,
        STATE_UDP_UNCONNECTED = 0x07,
        COLUMN_LOCAL = 1,
        COLUMN_STATE = 3,
        COLUMN_INODE = 9,
        COLUMNS = 10,
};

static const struct table {
        const char *path, *protocol;
        bool is_tcp;
} tables[] = {
        { "/proc/net/tcp", "tcp", true },
        { "/proc/net/tcp6", "tcp6", true },
        { "/proc/net/udp", "udp", false },
        { "/proc/net/udp6", "udp6", false },
};

struct found {
        struct port port;
        const char *protocol;
        pid_t pid;
        char process[32];
};

/* The kernel prints an address as words of 8 hex digits in the machine's byte order. */
static int parse_address(char *text, struct port *port) {
        uint32_t words[4];
        char *colon = strchr(text, ':');
        uint64_t value;
        size_t count;

        if (!colon)
                return -EINVAL;
        *colon = 0;
        count = strlen(text) / 8;
        if (strlen(text) % 8 != 0 || (count != 1 && count != 4))
                return -EINVAL;
        for (size_t i = 0; i < count; i++) {
                char word[9] = { 0 };

                memcpy(word, text + 8 * i, 8);
                if (parse_u64(word, 16, UINT32_MAX, &value) < 0)
                        return -EINVAL;
                words[i] = (uint32_t) value;
        }
        if (parse_u64(colon + 1, 16, UINT16_MAX, &value) < 0)
                return -EINVAL;
        port->number = (uint16_t) value;
        return inet_ntop(count == 1 ? AF_INET : AF_INET6, words, port->address, sizeof port->address) ? 0 : -EINVAL;
}

int port_parse(char *line, bool is_tcp, struct port *ret) {
        char *columns[COLUMNS];
        uint64_t state;

        for (size_t i = 0; i < COLUMNS; i++) {
                columns[i] = next_token(&line, " \t");
                if (!columns[i])
                        return 0;
        }
        if (parse_u64(columns[COLUMN_STATE], 16, UINT8_MAX, &state) < 0 ||
            state != (is_tcp ? STATE_TCP_LISTEN : STATE_UDP_UNCONNECTED))
                return 0;
        if (parse_address(columns[COLUMN_LOCAL], ret) < 0 ||
            parse_u64(columns[COLUMN_INODE], 10, UINT64_MAX, &ret->inode) < 0)
                return 0;
        return 1;
}

static size_t read_table(const struct table *table, struct found *found, size_t count) {
        _cleanup_(lines_close) struct lines lines;
        char *line;

        if (lines_open(&lines, table->path) < 0)
                return count;
        while (count < PORTS_MAX && lines_next(&lines, &line) > 0) {
                found[count] = (struct found) { .protocol = table->protocol };
                if (port_parse(line, table->is_tcp, &found[count].port) == 1)
                        count++;
        }
        return count;
}

static void name_owner(struct found *found, pid_t pid) {
        char path[64];
        ssize_t n;

        found->pid = pid;
        snprintf(path, sizeof path, "/proc/%d/comm", (int) pid);
        n = read_file(path, found->process, sizeof found->process);
        found->process[n < 0 ? 0 : strcspn(found->process, "\n")] = 0;
}

static void match_descriptor(int directory_fd, const char *name, pid_t pid, struct found *found, size_t count) {
        char target[64], inode_text[32];
        uint64_t inode;
        ssize_t n = readlinkat(directory_fd, name, target, sizeof target - 1);

        if (n < 0)
                return;
        target[n] = 0;
        if (sscanf(target, "socket:[%31[0-9]]", inode_text) != 1 || parse_u64(inode_text, 10, UINT64_MAX, &inode) < 0)
                return;
        for (size_t i = 0; i < count; i++)
                if (found[i].pid == 0 && found[i].port.inode == inode)
                        name_owner(found + i, pid);
}

static void match_process(pid_t pid, struct found *found, size_t count) {
        struct dirent *entry;
        char path[64];
        DIR *directory;

        snprintf(path, sizeof path, "/proc/%d/fd", (int) pid);
        directory = opendir(path);
        if (!directory)
                return;
        while ((entry = readdir(directory)))
                match_descriptor(dirfd(directory), entry->d_name, pid, found, count);
        closedir(directory);
}

static void match_processes(struct found *found, size_t count) {
        DIR *directory = opendir("/proc");
        struct dirent *entry;

        if (!directory)
                return;
        while ((entry = readdir(directory))) {
                uint64_t pid;

                if (parse_u64(entry->d_name, 10, INT32_MAX, &pid) == 0)
                        match_process((pid_t) pid, found, count);
        }
        closedir(directory);
}

static int send_port(struct conn *conn, const struct found *found) {
        struct builder builder;

        builder.used = 0;
        builder.full = false;
        builder_string(&builder, TAG_PROTOCOL, found->protocol);
        builder_string(&builder, TAG_ADDRESS, found->port.address);
        builder_u64(&builder, TAG_PORT, found->port.number);
        if (found->pid > 0) {
                builder_u64(&builder, TAG_PID, (uint64_t) found->pid);
                builder_string(&builder, TAG_PROCESS, found->process);
        }
        return conn_reply(conn, FRAME_ENTRY, &builder);
}

int serve_ports(struct conn *conn, struct frame *frame) {
        struct found *found;
        size_t count = 0;
        int r = 0;

        if (frame->size > 0)
                return conn_bad_request(conn, "ports takes no fields");
        found = calloc(PORTS_MAX, sizeof *found);
        if (!found)
                return conn_fail_errno(conn, ENOMEM, "cannot list the ports");
        for (size_t i = 0; i < ELEMENTSOF(tables); i++)
                count = read_table(tables + i, found, count);
        match_processes(found, count);
        for (size_t i = 0; i < count && r >= 0; i++)
                r = send_port(conn, found + i);
        free(found);
        return r < 0 ? r : conn_send(conn, FRAME_REPLY, NULL, 0);
}
