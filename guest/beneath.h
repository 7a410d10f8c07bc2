/* SPDX-License-Identifier: MIT */
/* Paths of an archive's members, walked below a directory so that no link leads out of it. */
#pragma once

#include <limits.h>
#include <stdbool.h>

#include "macro.h"

struct beneath {
        int root_fd;
        bool root_is_top;  /* the directory is "/": absolute links stay inside by nature */
        bool follow_links; /* links in the middle of a path are followed as long as they stay inside */
        int parent_fd;     /* of the last member, kept because its neighbours come next */
        char parent[PATH_MAX];
};

int beneath_open(struct beneath *beneath, const char *directory, bool follow_links, bool make);
void beneath_close(struct beneath *beneath);

/* Removes "." components and doubled slashes in place; -EXDEV for absolute paths and "..". The result may be "". */
int path_normalize(char *path);
/* Cuts count leading components off; false when nothing remains. */
bool path_strip(char *path, unsigned count);

/* Opens the directory of path, making what is missing; valid until the next call. *ret_name points into path. */
int beneath_parent(struct beneath *beneath, const char *path, bool make, int *ret_fd, const char **ret_name);
