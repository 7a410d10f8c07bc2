/* SPDX-License-Identifier: MIT */
/* Packs a path of the guest into a tar stream for the host. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#include "agent.h"
#include "io.h"
#include "tar.h"

enum {
        DEPTH_MAX = 500,
        LINKS_MAX = 64 * 1024, /* more than this many linked files are packed once per name */
        LINK_SLOTS = 2 * LINKS_MAX,
        XATTR_NAMES_MAX = 64 * 1024, /* the kernel's own limits */
        XATTR_VALUE_MAX = 64 * 1024,
        SHRUNK_NAMES_MAX = 6 * 1024, /* of what a reply holds */
        REPLACED_MAX = 100,
};

struct get_request {
        char *path;
        bool follow_link, one_file_system;
};

/* Where a file with several names was packed. A number is soon another file's: it is the same file while its
 * status did not change, which no two that had the number share. */
struct seen {
        dev_t device;
        ino_t inode;
        struct timespec changed;
        char *path;
};

struct get {
        struct conn *conn;
        const struct get_request *request;
        dev_t device;
        struct seen *seen; /* a hash table with open addresses; NULL until the first linked file */
        size_t seen_count;
        size_t frame_used;
        unsigned depth;
        uint64_t entries, bytes, shrunk;
        struct builder reply; /* begins with the names of files that shrank */
        char path[PATH_MAX]; /* of the member being packed */
        size_t path_length;
};

static uint8_t frame_buffer[FRAME_PAYLOAD_MAX];
static struct tar_entry entry;

static int parse_request(const struct frame *frame, struct get_request *ret) {
        struct fields fields = { .next = frame->payload, .end = frame->payload + frame->size };
        struct field field;
        int r;

        while ((r = fields_next(&fields, &field)) > 0) {
                if (field.tag == TAG_PATH)
                        r = field_string(&field, &ret->path);
                else if (field.tag == TAG_FOLLOW_LINKS)
                        r = field_bool(&field, &ret->follow_link);
                else if (field.tag == TAG_ONE_FILE_SYSTEM)
                        r = field_bool(&field, &ret->one_file_system);
                else
                        r = -EBADMSG;
                if (r < 0)
                        return r;
        }
        if (r < 0)
                return r;
        return ret->path && *ret->path == '/' && strlen(ret->path) < PATH_MAX ? 0 : -EBADMSG;
}

static int flush_frame(struct get *get) {
        int r = get->frame_used > 0 ? conn_send(get->conn, FRAME_DATA, frame_buffer, get->frame_used) : 0;

        get->frame_used = 0;
        return r;
}

static int send_bytes(void *context, const void *data, size_t size) {
        struct get *get = context;

        while (size > 0) {
                size_t n = min_size(size, sizeof frame_buffer - get->frame_used);

                memcpy(frame_buffer + get->frame_used, data, n);
                get->frame_used += n;
                data = (const uint8_t *) data + n;
                size -= n;
                if (get->frame_used == sizeof frame_buffer) {
                        int r = flush_frame(get);

                        if (r < 0)
                                return r;
                }
        }
        return 0;
}

static void note_shrunk(struct get *get) {
        get->shrunk++;
        if (get->reply.used + FIELD_HEADER_SIZE + get->path_length <= SHRUNK_NAMES_MAX)
                builder_string(&get->reply, TAG_SHRUNK, get->path);
}

/* Reads right into the frame. A file that shrinks is filled up with zeros, one that grows is cut. */
static int send_content(struct get *get, int fd, uint64_t size) {
        uint64_t left = size;

        while (left > 0) {
                size_t room = sizeof frame_buffer - get->frame_used;
                size_t wanted = left < room ? (size_t) left : room;
                ssize_t n = read(fd, frame_buffer + get->frame_used, wanted);
                int r;

                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return -errno;
                if (n == 0) {
                        note_shrunk(get);
                        r = tar_write_zeros(left, send_bytes, get);
                        if (r < 0)
                                return r;
                        break;
                }
                get->frame_used += (size_t) n;
                left -= (uint64_t) n;
                r = get->frame_used == sizeof frame_buffer ? flush_frame(get) : 0;
                if (r < 0)
                        return r;
        }
        get->bytes += size;
        return tar_write_zeros(tar_padding(size), send_bytes, get);
}

static struct seen *find_seen(struct get *get, const struct stat *status) {
        size_t slot = ((size_t) status->st_ino * 31 + (size_t) status->st_dev) % LINK_SLOTS;

        while (get->seen[slot].path &&
               (get->seen[slot].inode != status->st_ino || get->seen[slot].device != status->st_dev))
                slot = (slot + 1) % LINK_SLOTS;
        return get->seen + slot;
}

static bool is_unchanged(const struct seen *seen, const struct stat *status) {
        return seen->changed.tv_sec == status->st_ctim.tv_sec && seen->changed.tv_nsec == status->st_ctim.tv_nsec;
}

/* Returns the earlier name of a file with several, or NULL after remembering this one. */
static const char *earlier_name(struct get *get, const struct stat *status) {
        struct seen *seen;
        char *path;

        /* Who unpacks no device has none to link to. */
        if (status->st_nlink < 2 || S_ISDIR(status->st_mode) || S_ISCHR(status->st_mode) || S_ISBLK(status->st_mode))
                return NULL;
        if (!get->seen)
                get->seen = calloc(LINK_SLOTS, sizeof *get->seen);
        if (!get->seen)
                return NULL;
        seen = find_seen(get, status);
        if (seen->path && is_unchanged(seen, status))
                return seen->path;
        if (!seen->path && get->seen_count >= LINKS_MAX)
                return NULL;
        path = strdup(get->path);
        if (!path)
                return NULL;
        get->seen_count += seen->path == NULL;
        free(seen->path);
        *seen = (struct seen) {
                .device = status->st_dev,
                .inode = status->st_ino,
                .changed = status->st_ctim,
                .path = path,
        };
        return NULL;
}

/* A pax header's name ends at the first equals sign. */
static bool is_wanted_xattr(const char *name) {
        return (strncmp(name, "user.", 5) == 0 && !strchr(name, '=')) || strcmp(name, "security.capability") == 0;
}

static int collect_xattrs(int fd) {
        static char names[XATTR_NAMES_MAX];
        static uint8_t value[XATTR_VALUE_MAX];
        ssize_t size = flistxattr(fd, names, sizeof names);

        entry.xattrs.used = 0;
        if (size < 0)
                return errno == EOPNOTSUPP ? 0 : -errno;
        for (char *name = names; name < names + size; name += strlen(name) + 1) {
                ssize_t n = is_wanted_xattr(name) ? fgetxattr(fd, name, value, sizeof value) : -1;
                int r = n < 0 ? 0 : xattrs_add(&entry.xattrs, name, strlen(name), value, (size_t) n);

                if (r < 0)
                        return r;
        }
        return 0;
}

static char type_of(mode_t mode) {
        switch (mode & S_IFMT) {
        case S_IFREG:
                return TAR_FILE;
        case S_IFDIR:
                return TAR_DIRECTORY;
        case S_IFLNK:
                return TAR_SYMLINK;
        case S_IFCHR:
                return TAR_CHARACTER;
        case S_IFBLK:
                return TAR_BLOCK_DEVICE;
        case S_IFIFO:
                return TAR_FIFO;
        default: /* a socket, which no archive can hold */
                return 0;
        }
}

static int describe(const struct get *get, const struct stat *status) {
        bool directory = S_ISDIR(status->st_mode);
        bool device = S_ISCHR(status->st_mode) || S_ISBLK(status->st_mode);

        if (get->path_length + 2 > sizeof entry.path)
                return -ENAMETOOLONG;
        entry.type = type_of(status->st_mode);
        entry.mode = status->st_mode & 07777;
        entry.uid = status->st_uid;
        entry.gid = status->st_gid;
        entry.major = device ? major(status->st_rdev) : 0;
        entry.minor = device ? minor(status->st_rdev) : 0;
        entry.size = S_ISREG(status->st_mode) ? (uint64_t) status->st_size : 0;
        entry.mtime_s = status->st_mtim.tv_sec;
        entry.mtime_ns = (uint32_t) status->st_mtim.tv_nsec;
        memcpy(entry.path, get->path, get->path_length);
        memcpy(entry.path + get->path_length, directory ? "/" : "", directory ? 2 : 1);
        entry.link[0] = 0;
        entry.xattrs.used = 0;
        return 0;
}

static int get_link(struct get *get, int fd) {
        ssize_t n = readlinkat(fd, "", entry.link, sizeof entry.link - 1);

        if (n < 0)
                return -errno;
        entry.link[n] = 0;
        return tar_write_header(&entry, send_bytes, get);
}

static int get_hardlink(struct get *get, const char *target) {
        size_t length = strlen(target);

        entry.type = TAR_HARDLINK;
        entry.size = 0;
        memcpy(entry.link, target, length + 1);
        return tar_write_header(&entry, send_bytes, get);
}

static int get_file(struct get *get, int fd) {
        uint64_t size = entry.size;
        int r = collect_xattrs(fd);

        if (r >= 0)
                r = tar_write_header(&entry, send_bytes, get);
        return r < 0 ? r : send_content(get, fd, size);
}

static int get_entry(struct get *get, int parent_fd, const char *name);

static int push_name(struct get *get, const char *name) {
        size_t length = strlen(name);

        if (get->path_length + length + 2 > sizeof get->path)
                return -ENAMETOOLONG;
        get->path[get->path_length] = '/';
        memcpy(get->path + get->path_length + 1, name, length + 1);
        get->path_length += length + 1;
        return 0;
}

/* What vanishes while we look is no error. */
static int get_children(struct get *get, DIR *directory) {
        struct dirent *child;

        while ((errno = 0, child = readdir(directory))) {
                size_t length = get->path_length;
                int r;

                if (strcmp(child->d_name, ".") == 0 || strcmp(child->d_name, "..") == 0)
                        continue;
                r = push_name(get, child->d_name);
                if (r >= 0)
                        r = get_entry(get, dirfd(directory), child->d_name);
                if (r < 0 && r != -ENOENT)
                        return r;
                get->path_length = length;
                get->path[length] = 0;
        }
        return -errno;
}

/* Takes the descriptor. */
static int get_directory(struct get *get, int fd, dev_t device) {
        int r = collect_xattrs(fd);
        DIR *directory;

        if (r >= 0)
                r = tar_write_header(&entry, send_bytes, get);
        directory = r >= 0 ? fdopendir(fd) : NULL;
        if (!directory) {
                r = r < 0 ? r : -errno;
                close(fd);
                return r;
        }
        if (get->depth >= DEPTH_MAX)
                r = -ELOOP;
        else if (!get->request->one_file_system || device == get->device) {
                get->depth++;
                r = get_children(get, directory);
                get->depth--;
        }
        closedir(directory);
        return r;
}

/* What is there is opened, so that all that is said of it is of the very one that is read. Returns a descriptor, or
 * -EAGAIN when something of another type has just taken its place. */
static int open_once(int parent_fd, const char *name, struct stat *ret) {
        int flags = O_PATH | O_NOFOLLOW | O_CLOEXEC;
        _cleanup_close_ int fd = -1;
        mode_t type;

        if (fstatat(parent_fd, name, ret, AT_SYMLINK_NOFOLLOW) < 0)
                return -errno;
        type = ret->st_mode & S_IFMT;
        if (type == S_IFREG || type == S_IFDIR)
                flags = O_RDONLY | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW | O_CLOEXEC;
        fd = openat(parent_fd, name, flags);
        if (fd < 0) /* a link; a socket or a device that does not answer */
                return errno == ELOOP || errno == ENXIO ? -EAGAIN : -errno;
        if (fstat(fd, ret) < 0)
                return -errno;
        return (ret->st_mode & S_IFMT) == type ? take_fd(&fd) : -EAGAIN;
}

static int open_entry(int parent_fd, const char *name, struct stat *ret) {
        int fd = -EAGAIN;

        for (unsigned i = 0; i < REPLACED_MAX && fd == -EAGAIN; i++)
                fd = open_once(parent_fd, name, ret);
        return fd;
}

static int get_entry(struct get *get, int parent_fd, const char *name) {
        _cleanup_close_ int fd = -1;
        const char *earlier;
        struct stat status;
        int r;

        fd = open_entry(parent_fd, name, &status);
        if (fd < 0)
                return fd;
        if (type_of(status.st_mode) == 0)
                return 0;
        r = describe(get, &status);
        if (r < 0)
                return r;
        get->entries++;
        earlier = earlier_name(get, &status);
        if (earlier)
                return get_hardlink(get, earlier);
        switch (entry.type) {
        case TAR_FILE:
                return get_file(get, fd);
        case TAR_DIRECTORY:
                return get_directory(get, take_fd(&fd), status.st_dev);
        case TAR_SYMLINK:
                return get_link(get, fd);
        default:
                return tar_write_header(&entry, send_bytes, get);
        }
}

/* Members are named from the last component of the path on; "/" itself is ".". */
static int get_top(struct get *get, char *path) {
        char copy[PATH_MAX], resolved[PATH_MAX];
        _cleanup_close_ int parent_fd = -1;
        struct stat status;
        const char *name;

        if (get->request->follow_link) {
                if (!realpath(path, resolved))
                        return -errno;
                path = resolved;
        }
        if (lstat(path, &status) < 0)
                return -errno;
        get->device = status.st_dev;
        memcpy(copy, path, strlen(path) + 1);
        parent_fd = open(dirname(copy), O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (parent_fd < 0)
                return -errno;
        name = basename(path);
        if (strcmp(name, "/") == 0)
                name = ".";
        if (strcmp(name, "..") == 0)
                return -EINVAL;
        get->path_length = strlen(name);
        memcpy(get->path, name, get->path_length + 1);
        return get_entry(get, parent_fd, name);
}

static void allow_deep_trees(void) {
        struct rlimit limit;

        if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur >= 2 * DEPTH_MAX)
                return;
        limit.rlim_cur = limit.rlim_max;
        (void) setrlimit(RLIMIT_NOFILE, &limit);
}

static void forget_seen(struct get *get) {
        for (size_t i = 0; get->seen && i < LINK_SLOTS; i++)
                free(get->seen[i].path);
        free(get->seen);
}

int serve_get(struct conn *conn, struct frame *frame) {
        struct get_request request = { 0 };
        struct get get = { .conn = conn, .request = &request };
        int r;

        if (parse_request(frame, &request) < 0)
                return conn_bad_request(conn, "malformed get request");
        allow_deep_trees();
        r = get_top(&get, request.path);
        if (r >= 0)
                r = tar_write_end(send_bytes, &get);
        if (r >= 0)
                r = flush_frame(&get);
        forget_seen(&get);
        if (r == -ECONNRESET || r == -EPIPE)
                return r;
        if (r < 0)
                return conn_fail_errno(conn, -r, "cannot pack %.500s", *get.path ? get.path : request.path);
        r = conn_send(conn, FRAME_DATA, NULL, 0);
        if (r < 0)
                return r;
        builder_u64(&get.reply, TAG_SHRUNK_COUNT, get.shrunk);
        builder_u64(&get.reply, TAG_ENTRIES, get.entries);
        builder_u64(&get.reply, TAG_BYTES, get.bytes);
        return conn_reply(conn, FRAME_REPLY, &get.reply);
}
