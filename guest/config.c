/* SPDX-License-Identifier: MIT */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "config.h"
#include "io.h"

#define WORD_PREFIX "banger."
#define INIT_WORD "banger.init=" /* init.c's */

/* Copies text that must fit. */
static int take_text(char *target, size_t size, const char *text) {
        size_t length = strlen(text);

        if (length >= size)
                return -EINVAL;
        memcpy(target, text, length + 1);
        return 0;
}

static int take_address(char *target, const char *text) {
        struct in_addr address;

        if (*text == 0)
                return 0;
        if (inet_pton(AF_INET, text, &address) != 1)
                return -EINVAL;
        return take_text(target, 16, text);
}

/* The kernel writes a netmask as an address; a prefix length is accepted too. */
static int take_netmask(char *target, const char *text) {
        struct in_addr mask;
        uint64_t bits;

        if (parse_u64(text, 10, 32, &bits) < 0)
                return take_address(target, text);
        mask.s_addr = bits == 0 ? 0 : htonl(0xffffffffU << (32 - bits));
        return inet_ntop(AF_INET, &mask, target, 16) ? 0 : -EINVAL;
}

static int take_ip_part(struct ip_config *ip, size_t index, const char *text) {
        switch (index) {
        case 0:
                return take_address(ip->address, text);
        case 2:
                return take_address(ip->gateway, text);
        case 3:
                return take_netmask(ip->netmask, text);
        case 4:
                return take_text(ip->hostname, sizeof ip->hostname, text);
        case 5:
                return take_text(ip->device, sizeof ip->device, text);
        case 7:
                return take_address(ip->dns[0], text);
        case 8:
                return take_address(ip->dns[1], text);
        default: /* the NFS server, the autoconfiguration method and the time server are not for us */
                return 0;
        }
}

int ip_config_parse(char *text, struct ip_config *ret) {
        *ret = (struct ip_config) { 0 };
        for (size_t i = 0; text; i++) {
                char *colon = strchr(text, ':');

                if (colon)
                        *colon++ = 0;
                if (take_ip_part(ret, i, text) < 0)
                        return -EINVAL;
                text = colon;
        }
        if (*ret->address == 0)
                return -EINVAL;
        if (*ret->device == 0)
                (void) take_text(ret->device, sizeof ret->device, "eth0");
        if (*ret->netmask == 0)
                (void) take_text(ret->netmask, sizeof ret->netmask, "255.255.255.0");
        return 0;
}

static int take_address6(char *target, const char *text) {
        struct in6_addr address;

        if (inet_pton(AF_INET6, text, &address) != 1)
                return -EINVAL;
        return take_text(target, 40, text);
}

int ip6_config_parse(char *text, struct ip6_config *ret) {
        char *address = next_token(&text, "/"), *length = next_token(&text, ","), *gateway = next_token(&text, ",");
        uint64_t bits;

        *ret = (struct ip6_config) { 0 };
        if (!address || !length || *text || parse_u64(length, 10, 128, &bits) < 0 || take_address6(ret->address, address) < 0)
                return -EINVAL;
        ret->prefix_length = (unsigned) bits;
        return gateway ? take_address6(ret->gateway, gateway) : 0;
}

void config_add_dns(struct config *config, const char *address) {
        if (*address == 0 || config->dns_count >= CONFIG_DNS_MAX)
                return;
        for (size_t i = 0; i < config->dns_count; i++)
                if (strcmp(config->dns[i], address) == 0)
                        return;
        if (take_address(config->dns[config->dns_count], address) == 0)
                config->dns_count++;
}

static size_t find_mount(const struct config *config, const char *target) {
        size_t i = 0;

        while (i < config->mount_count && strcmp(config->mounts[i].target, target) != 0)
                i++;
        return i;
}

static int take_mount(struct config *config, char *text) {
        char *device = next_token(&text, ":"), *target = next_token(&text, ":"), *type = next_token(&text, ":");
        struct mount_config mount;
        size_t at;

        if (!device || !target || !type || *text || *device != '/' || *target != '/')
                return -EINVAL;
        if (take_text(mount.device, sizeof mount.device, device) < 0 ||
            take_text(mount.target, sizeof mount.target, target) < 0 ||
            take_text(mount.type, sizeof mount.type, type) < 0)
                return -EINVAL;
        at = find_mount(config, target);
        if (at >= CONFIG_MOUNTS_MAX)
                return -EINVAL;
        config->mounts[at] = mount;
        config->mount_count += at == config->mount_count;
        return 0;
}

static int take_ip(struct config *config, char *text) {
        int r = ip_config_parse(text, &config->ip);

        config->ip_given = r == 0;
        return r;
}

static int take_ip6(struct config *config, char *text) {
        struct ip6_config ip6;

        if (ip6_config_parse(text, &ip6) < 0)
                return -EINVAL;
        config->ip6 = ip6;
        config->ip6_given = true;
        return 0;
}

static int take_dns(struct config *config, const char *text) {
        struct in_addr address;

        if (inet_pton(AF_INET, text, &address) != 1)
                return -EINVAL;
        config_add_dns(config, text);
        return 0;
}

/* Returns 0, -ENOENT for an unknown key, -EINVAL for a bad line. */
int config_parse_line(struct config *config, char *line) {
        char *value;

        if (*line == 0 || *line == '#')
                return 0;
        value = strchr(line, '=');
        if (!value)
                return -EINVAL;
        *value++ = 0;
        if (strcmp(line, "hostname") == 0)
                return take_text(config->hostname, sizeof config->hostname, value);
        if (strcmp(line, "ip") == 0)
                return take_ip(config, value);
        if (strcmp(line, "ip6") == 0)
                return take_ip6(config, value);
        if (strcmp(line, "dns") == 0)
                return take_dns(config, value);
        if (strcmp(line, "mount") == 0)
                return take_mount(config, value);
        return -ENOENT;
}

static void take_line(struct config *config, char *line) {
        if (config_parse_line(config, line) < 0 && config->bad_lines++ == 0)
                snprintf(config->first_bad, sizeof config->first_bad, "%s", line);
}

static void load_file(struct config *config, const char *path) {
        _cleanup_(lines_close) struct lines lines;
        char *line;

        if (lines_open(&lines, path) < 0)
                return;
        while (lines_next(&lines, &line) > 0)
                take_line(config, line);
}

static void take_words(struct config *config, const struct cmdline *words) {
        const size_t length = strlen(WORD_PREFIX);
        char line[512];

        for (size_t at = 0; at < words->size; at += strlen(words->text + at) + 1) {
                const char *word = words->text + at;

                if (strncmp(word, WORD_PREFIX, length) != 0 || strncmp(word, INIT_WORD, strlen(INIT_WORD)) == 0)
                        continue;
                snprintf(line, sizeof line, "%s", word + length);
                take_line(config, line);
        }
}

void config_load(struct config *config, const char *path, const struct cmdline *words) {
        *config = (struct config) { 0 };
        load_file(config, path);
        take_words(config, words);
}

void cmdline_split(struct cmdline *cmdline) {
        for (size_t i = 0; i < cmdline->size; i++)
                if (strchr(" \t\n", cmdline->text[i]))
                        cmdline->text[i] = 0;
}

void cmdline_load(struct cmdline *cmdline) {
        ssize_t n = read_file("/proc/cmdline", cmdline->text, sizeof cmdline->text);

        cmdline->size = n < 0 ? 0 : (size_t) n;
        cmdline->text[cmdline->size] = 0;
        cmdline_split(cmdline);
}

static const char *find_word(const struct cmdline *cmdline, const char *name, size_t *ret_at) {
        const char *found = NULL;
        size_t length = strlen(name);

        for (size_t at = 0; at < cmdline->size; at += strlen(cmdline->text + at) + 1) {
                const char *word = cmdline->text + at;

                if (strncmp(word, name, length) != 0 || (word[length] != 0 && word[length] != '='))
                        continue;
                found = word + length + (word[length] == '=');
                *ret_at = at;
        }
        return found;
}

const char *cmdline_value(const struct cmdline *cmdline, const char *name) {
        size_t at;

        return find_word(cmdline, name, &at);
}

bool cmdline_read_only(const struct cmdline *cmdline) {
        size_t ro_at = 0, rw_at = 0;

        if (!find_word(cmdline, "ro", &ro_at))
                return false;
        return !find_word(cmdline, "rw", &rw_at) || ro_at > rw_at;
}
