/* SPDX-License-Identifier: MIT */
/* Any text as what the guest's files and its kernel hold: configuration, command line, accounts, sockets. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "config.h"
#include "io.h"
#include "ports.h"
#include "user.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_cmdline(const char *text, size_t size) {
        static struct cmdline cmdline;
        static struct config config;

        cmdline.size = min_size(size, sizeof cmdline.text - 1);
        memcpy(cmdline.text, text, cmdline.size);
        cmdline.text[cmdline.size] = 0;
        cmdline_split(&cmdline);
        (void) cmdline_value(&cmdline, "ip");
        (void) cmdline_read_only(&cmdline);
        config_load(&config, "/dev/null", &cmdline);
        if (config.mount_count > CONFIG_MOUNTS_MAX || config.dns_count > CONFIG_DNS_MAX)
                abort();
        if (config.ip6_given && (*config.ip6.address == 0 || config.ip6.prefix_length > 128))
                abort();
}

static void read_port(char *text) {
        struct port port;

        if (port_parse(text, *text & 1, &port) == 1 && strlen(port.address) >= sizeof port.address)
                abort();
}

static void read_ip(char *text) {
        struct ip_config ip;

        if (ip_config_parse(text, &ip) == 0 && (*ip.address == 0 || *ip.device == 0 || *ip.netmask == 0))
                abort();
}

static void read_file_of(const uint8_t *data, size_t size) {
        static struct config config;
        static struct user user;
        char path[64];
        int fd = memfd_create("fuzz", 0);

        if (fd < 0 || write_all(fd, data, size) < 0)
                abort();
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        config_load(&config, path, &(struct cmdline) { 0 });
        if (user_lookup(path, path, "root", &user) < 0)
                abort();
        (void) user_lookup(path, path, "a:b", &user);
        close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
        char *text;

        if (size == 0)
                return 0;
        text = malloc(size);
        memcpy(text, data + 1, size - 1);
        text[size - 1] = 0;
        switch (*data % 4) {
        case 0:
                read_cmdline(text, size - 1);
                break;
        case 1:
                read_port(text);
                break;
        case 2:
                read_ip(text);
                break;
        default:
                read_file_of(data + 1, size - 1);
        }
        free(text);
        return 0;
}
