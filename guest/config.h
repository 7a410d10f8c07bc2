/* SPDX-License-Identifier: MIT */
/* What the host says: `banger.` words of the kernel command line, and before them /.banger/config. Parsing only. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "macro.h"

#define CONFIG_PATH "/.banger/config"

enum { CONFIG_DNS_MAX = 3, CONFIG_MOUNTS_MAX = 8 };

/* As in the kernel's ip= parameter; empty strings where nothing is given. Addresses are IPv4 in text. */
struct ip_config {
        char address[16], gateway[16], netmask[16];
        char hostname[65], device[16];
        char dns[2][16];
};

/* The address the host leased, and by whom everything else is reached. */
struct ip6_config {
        char address[40], gateway[40];
        unsigned prefix_length;
};

struct mount_config {
        char device[64], target[256], type[32];
};

struct config {
        char hostname[65];
        bool ip_given;
        struct ip_config ip;
        bool ip6_given;
        struct ip6_config ip6;
        size_t dns_count;
        char dns[CONFIG_DNS_MAX][16];
        size_t mount_count;
        struct mount_config mounts[CONFIG_MOUNTS_MAX];
        unsigned bad_lines; /* of an unknown key or with a bad value: left out */
        char first_bad[64];
};

/* Changes the text; -EINVAL when a part cannot be what it should be. */
int ip_config_parse(char *text, struct ip_config *ret);

/* ADDRESS/LENGTH[,GATEWAY]. Changes the text; -EINVAL. */
int ip6_config_parse(char *text, struct ip6_config *ret);

/* The kernel command line, cut into words. */
struct cmdline {
        size_t size;
        char text[4096];
};

void cmdline_load(struct cmdline *cmdline);
void cmdline_split(struct cmdline *cmdline);

/* The value of the last name=, "" for a bare name, NULL when absent. */
const char *cmdline_value(const struct cmdline *cmdline, const char *name);
bool cmdline_read_only(const struct cmdline *cmdline);

int config_parse_line(struct config *config, char *line);
/* The file's lines, then each `banger.key=value` of the words, which win. */
void config_load(struct config *config, const char *path, const struct cmdline *words);
void config_add_dns(struct config *config, const char *address);
