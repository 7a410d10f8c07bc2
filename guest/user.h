/* SPDX-License-Identifier: MIT */
/* Users as the image's own /etc/passwd and /etc/group name them; no libc lookup, which would need nsswitch modules. */
#pragma once

#include <sys/types.h>

#include "macro.h"

struct user {
        uid_t uid;
        gid_t gid;
        size_t group_count;
        gid_t groups[1024]; /* who is in more is in the first of them */
        char name[256];
        char home[1024];
        char shell[256];
};

/* spec is name, uid, name:group or uid:gid; -ENOENT when a name is not known. */
int user_lookup(const char *passwd_path, const char *group_path, const char *spec, struct user *ret);
