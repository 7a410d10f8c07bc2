/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <linux/openat2.h>

#include "beneath.h"
#include "io.h"

enum { DIRECTORY_FLAGS = O_PATH | O_DIRECTORY | O_CLOEXEC };

int beneath_open(struct beneath *beneath, const char *directory, bool follow_links, bool make) {
        struct stat root, top;
        int r;

        *beneath = (struct beneath) { .root_fd = -1, .parent_fd = -1, .follow_links = follow_links };
        if (make && (r = make_directories(directory, 0755)) < 0)
                return r;
        beneath->root_fd = open(directory, DIRECTORY_FLAGS);
        if (beneath->root_fd < 0)
                return -errno;
        if (fstat(beneath->root_fd, &root) < 0 || stat("/", &top) < 0)
                return -errno;
        beneath->root_is_top = root.st_dev == top.st_dev && root.st_ino == top.st_ino;
        return 0;
}

void beneath_close(struct beneath *beneath) {
        close_fdp(&beneath->parent_fd);
        close_fdp(&beneath->root_fd);
}

int path_normalize(char *path) {
        char *in = path, *out = path;

        if (*path == '/')
                return -EXDEV;
        while (*in) {
                size_t length = strcspn(in, "/");
                bool last = in[length] == 0;

                if (length == 2 && memcmp(in, "..", 2) == 0)
                        return -EXDEV;
                if (length > 0 && !(length == 1 && *in == '.')) {
                        if (out > path)
                                *out++ = '/';
                        memmove(out, in, length);
                        out += length;
                }
                in += length + !last;
        }
        *out = 0;
        return 0;
}

bool path_strip(char *path, unsigned count) {
        char *rest = path;

        while (count-- > 0) {
                rest = strchr(rest, '/');
                if (!rest)
                        return false;
                rest++;
        }
        memmove(path, rest, strlen(rest) + 1);
        return true;
}

/* The prefix is followed as a whole by the kernel, which keeps it inside. */
static int open_following(const struct beneath *beneath, const char *prefix) {
        struct open_how how = {
                .flags = (uint64_t) DIRECTORY_FLAGS,
                .resolve = RESOLVE_NO_MAGICLINKS | (beneath->root_is_top ? RESOLVE_IN_ROOT : RESOLVE_BENEATH),
        };
        long fd = syscall(SYS_openat2, beneath->root_fd, prefix, &how, sizeof how);

        return fd < 0 ? -errno : (int) fd;
}

/* Opens one component below fd; prefix is the path so far, that component included. */
static int step(const struct beneath *beneath, int fd, const char *prefix, const char *name, bool make) {
        int next = openat(fd, name, DIRECTORY_FLAGS | O_NOFOLLOW);

        if (next < 0 && errno == ENOENT && make) {
                if (mkdirat(fd, name, 0755) < 0 && errno != EEXIST)
                        return -errno;
                next = openat(fd, name, DIRECTORY_FLAGS | O_NOFOLLOW);
        }
        if (next >= 0)
                return next;
        if (beneath->follow_links && (errno == ELOOP || errno == ENOTDIR))
                return open_following(beneath, prefix);
        return errno == ENOTDIR ? -ELOOP : -errno;
}

static int walk(const struct beneath *beneath, char *prefix, bool make) {
        _cleanup_close_ int fd = fcntl(beneath->root_fd, F_DUPFD_CLOEXEC, 0);
        char *name = prefix;

        if (fd < 0)
                return -errno;
        while (*name) {
                char *slash = strchr(name, '/');
                int next;

                if (slash)
                        *slash = 0;
                next = step(beneath, fd, prefix, name, make);
                if (next < 0)
                        return next;
                close(fd);
                fd = next;
                if (!slash)
                        break;
                *slash = '/';
                name = slash + 1;
        }
        return take_fd(&fd);
}

int beneath_parent(struct beneath *beneath, const char *path, bool make, int *ret_fd, const char **ret_name) {
        const char *slash = strrchr(path, '/');
        size_t length = slash ? (size_t) (slash - path) : 0;
        char prefix[PATH_MAX];
        int fd;

        if (length >= sizeof prefix)
                return -ENAMETOOLONG;
        memcpy(prefix, path, length);
        prefix[length] = 0;
        *ret_name = slash ? slash + 1 : path;
        if (beneath->parent_fd >= 0 && strcmp(prefix, beneath->parent) == 0) {
                *ret_fd = beneath->parent_fd;
                return 0;
        }
        fd = walk(beneath, prefix, make);
        if (fd < 0)
                return fd;
        close_fdp(&beneath->parent_fd);
        beneath->parent_fd = fd;
        memcpy(beneath->parent, path, length);
        beneath->parent[length] = 0;
        *ret_fd = fd;
        return 0;
}
