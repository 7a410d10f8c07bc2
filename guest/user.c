/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "io.h"
#include "user.h"

enum { ID_MAX = 0xfffffffe };

/* Splits a line at the colons, in place. Returns the number of columns. */
static size_t split_columns(char *line, char **columns, size_t max) {
        size_t n = 0;

        while (n < max) {
                columns[n++] = line;
                line = strchr(line, ':');
                if (!line)
                        break;
                *line++ = 0;
        }
        return n;
}

static int parse_id(const char *text, uint32_t *ret) {
        uint64_t value;
        int r = parse_u64(text, 10, ID_MAX, &value);

        if (r < 0)
                return r;
        *ret = (uint32_t) value;
        return 0;
}

static void copy_text(char *target, size_t size, const char *text) {
        snprintf(target, size, "%s", text);
}

static int take_account(struct user *user, char **columns) {
        if (parse_id(columns[2], &user->uid) < 0 || parse_id(columns[3], &user->gid) < 0)
                return -EINVAL;
        copy_text(user->name, sizeof user->name, columns[0]);
        if (*columns[5])
                copy_text(user->home, sizeof user->home, columns[5]);
        if (*columns[6])
                copy_text(user->shell, sizeof user->shell, columns[6]);
        return 0;
}

/* Returns 1 when the account is there, 0 when it is not. */
static int find_account(const char *path, const char *name, const uint32_t *uid, struct user *user) {
        _cleanup_(lines_close) struct lines lines;
        char *line;

        if (lines_open(&lines, path) < 0)
                return 0;
        while (lines_next(&lines, &line) > 0) {
                char *columns[7];
                uint32_t id;

                if (split_columns(line, columns, ELEMENTSOF(columns)) < 7 || parse_id(columns[2], &id) < 0)
                        continue;
                if (uid ? id != *uid : strcmp(columns[0], name) != 0)
                        continue;
                if (take_account(user, columns) == 0)
                        return 1;
        }
        return 0;
}

static int find_group(const char *path, const char *name, gid_t *ret) {
        _cleanup_(lines_close) struct lines lines;
        char *line;

        if (lines_open(&lines, path) < 0)
                return -ENOENT;
        while (lines_next(&lines, &line) > 0) {
                char *columns[4];

                if (split_columns(line, columns, ELEMENTSOF(columns)) >= 3 && strcmp(columns[0], name) == 0)
                        return parse_id(columns[2], ret);
        }
        return -ENOENT;
}

static void add_group(struct user *user, gid_t gid) {
        for (size_t i = 0; i < user->group_count; i++)
                if (user->groups[i] == gid)
                        return;
        if (user->group_count < ELEMENTSOF(user->groups))
                user->groups[user->group_count++] = gid;
}

static void add_memberships(const char *path, struct user *user) {
        _cleanup_(lines_close) struct lines lines;
        char *line;

        if (lines_open(&lines, path) < 0)
                return;
        while (lines_next(&lines, &line) > 0) {
                char *columns[4], *members, *member;
                gid_t gid;

                if (split_columns(line, columns, ELEMENTSOF(columns)) < 4 || parse_id(columns[2], &gid) < 0)
                        continue;
                members = columns[3];
                while ((member = next_token(&members, ",")))
                        if (strcmp(member, user->name) == 0)
                                add_group(user, gid);
        }
}

static int lookup_account(const char *passwd_path, const char *name, struct user *user) {
        uint32_t uid;

        *user = (struct user) { .home = "/", .shell = "/bin/sh" };
        if (find_account(passwd_path, name, NULL, user))
                return 0;
        if (parse_id(name, &uid) == 0) {
                copy_text(user->name, sizeof user->name, name);
                user->uid = uid;
                if (find_account(passwd_path, NULL, &uid, user) || uid != 0)
                        return 0;
                name = "root";
        }
        if (strcmp(name, "root") != 0)
                return -ENOENT;
        /* An image may come without /etc/passwd; root is there all the same. */
        copy_text(user->name, sizeof user->name, "root");
        copy_text(user->home, sizeof user->home, "/root");
        return 0;
}

int user_lookup(const char *passwd_path, const char *group_path, const char *spec, struct user *ret) {
        char name[256];
        const char *colon = strchr(spec, ':');
        size_t length = colon ? (size_t) (colon - spec) : strlen(spec);
        int r;

        if (length == 0 || length >= sizeof name)
                return -EINVAL;
        memcpy(name, spec, length);
        name[length] = 0;
        r = lookup_account(passwd_path, name, ret);
        if (r < 0)
                return r;
        if (!colon) {
                add_group(ret, ret->gid);
                add_memberships(group_path, ret);
                return 0;
        }
        r = find_group(group_path, colon + 1, &ret->gid);
        if (r < 0)
                r = parse_id(colon + 1, &ret->gid) < 0 ? -ENOENT : 0;
        add_group(ret, ret->gid);
        return r;
}
