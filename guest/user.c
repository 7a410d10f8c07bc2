/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "io.h"
#include "user.h"

enum { ID_MAX = 0xfffffffe };

/* A file read column by column: a group has as many members as it likes, so no line is held as a whole. */
struct table {
        int fd;
        size_t at, used;
        char buffer[4096];
};

struct account {
        char name[256], home[1024], shell[256];
        uid_t uid;
        gid_t gid;
};

struct group {
        char name[256];
        gid_t gid;
        int end; /* what ended the column before the members: a colon, unless there are none */
};

enum { FILE_END = -1 };

static int table_open(struct table *table, const char *path) {
        table->fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
        table->at = table->used = 0;
        return table->fd < 0 ? -errno : 0;
}

static void table_close(struct table *table) {
        close_fdp(&table->fd);
}

static int next_byte(struct table *table) {
        ssize_t n;

        if (table->at < table->used)
                return (unsigned char) table->buffer[table->at++];
        do
                n = read(table->fd, table->buffer, sizeof table->buffer);
        while (n < 0 && errno == EINTR);
        if (n <= 0)
                return FILE_END;
        table->used = (size_t) n;
        table->at = 1;
        return (unsigned char) *table->buffer;
}

/* Takes what comes before a colon, the separator or the line's end, and returns which it was. What does not fit is
 * nothing that anybody asks for. */
static int next_word(struct table *table, int separator, char *ret, size_t size) {
        size_t used = 0;
        int c;

        while ((c = next_byte(table)) != ':' && c != separator && c != '\n' && c != FILE_END) {
                if (used < size)
                        ret[used] = (char) c;
                used += used < size;
        }
        ret[used < size ? used : 0] = 0;
        return c;
}

static void skip_line(struct table *table, int end) {
        while (end != '\n' && end != FILE_END)
                end = next_byte(table);
}

static int parse_id(const char *text, uint32_t *ret) {
        uint64_t value;
        int r = parse_u64(text, 10, ID_MAX, &value);

        if (r < 0)
                return r;
        *ret = (uint32_t) value;
        return 0;
}

/* Returns false at the end of the file. */
static bool next_account(struct table *table, struct account *ret) {
        char uid[16], gid[16], unused[1];
        const struct {
                char *text;
                size_t size;
        } columns[] = {
                { ret->name, sizeof ret->name }, { unused, sizeof unused },       { uid, sizeof uid },
                { gid, sizeof gid },             { unused, sizeof unused },       { ret->home, sizeof ret->home },
                { ret->shell, sizeof ret->shell },
        };

        for (;;) {
                size_t n = 0;
                int end = ':';

                while (n < ELEMENTSOF(columns) && end == ':') {
                        end = next_word(table, ':', columns[n].text, columns[n].size);
                        n++;
                }
                skip_line(table, end);
                if (n == ELEMENTSOF(columns) && parse_id(uid, &ret->uid) == 0 && parse_id(gid, &ret->gid) == 0)
                        return true;
                if (end == FILE_END)
                        return false;
        }
}

/* Goes to the members of the next group. Returns false at the end of the file. */
static bool next_group(struct table *table, struct group *ret) {
        char id[16], unused[1];

        for (;;) {
                int end = next_word(table, ':', ret->name, sizeof ret->name);

                if (end == FILE_END)
                        return false;
                if (end == ':')
                        end = next_word(table, ':', unused, sizeof unused);
                if (end == ':') {
                        end = next_word(table, ':', id, sizeof id);
                        ret->end = end;
                        if (parse_id(id, &ret->gid) == 0)
                                return true;
                }
                skip_line(table, end);
        }
}

static void copy_text(char *target, size_t size, const char *text) {
        snprintf(target, size, "%s", text);
}

static void take_account(struct user *user, const struct account *account) {
        user->uid = account->uid;
        user->gid = account->gid;
        copy_text(user->name, sizeof user->name, account->name);
        if (*account->home)
                copy_text(user->home, sizeof user->home, account->home);
        if (*account->shell)
                copy_text(user->shell, sizeof user->shell, account->shell);
}

static bool find_account(const char *path, const char *name, const uint32_t *uid, struct user *user) {
        _cleanup_(table_close) struct table table;
        struct account account;

        if (table_open(&table, path) < 0)
                return false;
        while (next_account(&table, &account)) {
                if (uid ? account.uid != *uid : strcmp(account.name, name) != 0)
                        continue;
                take_account(user, &account);
                return true;
        }
        return false;
}

static int find_group(const char *path, const char *name, gid_t *ret) {
        _cleanup_(table_close) struct table table;
        struct group group;

        if (table_open(&table, path) < 0)
                return -ENOENT;
        for (; next_group(&table, &group); skip_line(&table, group.end))
                if (*name && strcmp(group.name, name) == 0) {
                        *ret = group.gid;
                        return 0;
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
        _cleanup_(table_close) struct table table;
        struct group group;

        if (table_open(&table, path) < 0)
                return;
        while (next_group(&table, &group)) {
                int end = group.end == ':' ? ',' : group.end;
                char member[256];

                while (end == ',') {
                        end = next_word(&table, ',', member, sizeof member);
                        if (*member && strcmp(member, user->name) == 0)
                                add_group(user, group.gid);
                }
                skip_line(&table, end);
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
