/* SPDX-License-Identifier: MIT */
/* Unpacks the host's tar stream below a directory. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#include "agent.h"
#include "beneath.h"
#include "io.h"
#include "tar.h"

enum {
        STRIP_MAX = 64,
        DEFERRED_MAX = 16 * 1024 * 1024, /* bytes of directory names; beyond it times are set at once */
};

struct put_request {
        char *path;
        bool uid_given, gid_given, follow_links, make_directory;
        uid_t uid;
        gid_t gid;
        unsigned strip;
};

/* A directory's mode and times are set when nothing more is written into it. */
struct deferred {
        struct deferred *next;
        mode_t mode;
        struct timespec mtime;
        char path[];
};

struct put {
        struct conn *conn;
        const struct put_request *request;
        struct beneath beneath;
        struct frame frame; /* the DATA frame being read */
        size_t frame_used;
        bool input_ended;
        struct deferred *deferred; /* the deepest and latest first */
        size_t deferred_size;
        uint64_t entries, bytes;
};

static struct tar_reader reader;
static struct tar_entry entry;

static int take_id(const struct field *field, uint32_t *ret, bool *ret_given) {
        uint64_t value;
        int r = field_u64(field, UINT32_MAX - 1, &value);

        *ret = r < 0 ? 0 : (uint32_t) value;
        *ret_given = r >= 0;
        return r;
}

static int parse_field(struct put_request *request, const struct field *field) {
        uint64_t strip;

        switch (field->tag) {
        case TAG_PATH:
                return field_string(field, &request->path);
        case TAG_UID:
                return take_id(field, &request->uid, &request->uid_given);
        case TAG_GID:
                return take_id(field, &request->gid, &request->gid_given);
        case TAG_FOLLOW_LINKS:
                return field_bool(field, &request->follow_links);
        case TAG_MAKE_DIRECTORY:
                return field_bool(field, &request->make_directory);
        case TAG_STRIP:
                if (field_u64(field, STRIP_MAX, &strip) < 0)
                        return -EBADMSG;
                request->strip = (unsigned) strip;
                return 0;
        default:
                return -EBADMSG;
        }
}

static int parse_request(const struct frame *frame, struct put_request *ret) {
        struct fields fields = { .next = frame->payload, .end = frame->payload + frame->size };
        struct field field;
        int r;

        while ((r = fields_next(&fields, &field)) > 0) {
                r = parse_field(ret, &field);
                if (r < 0)
                        return r;
        }
        if (r < 0)
                return r;
        return ret->path && *ret->path == '/' ? 0 : -EBADMSG;
}

static int next_piece(void *context, size_t max, const uint8_t **ret_data, size_t *ret_size) {
        struct put *put = context;

        *ret_size = 0;
        while (!put->input_ended && put->frame_used == put->frame.size) {
                int r = conn_receive(put->conn, UINT64_MAX, &put->frame);

                if (r < 0)
                        return r == -EMSGSIZE ? -EPROTO : r;
                if (put->frame.type != FRAME_DATA)
                        return -EPROTO;
                put->frame_used = 0;
                put->input_ended = put->frame.size == 0;
        }
        if (put->input_ended)
                return 0;
        *ret_data = put->frame.payload + put->frame_used;
        *ret_size = min_size(max, put->frame.size - put->frame_used);
        put->frame_used += *ret_size;
        return 0;
}

static void choose_owner(const struct put *put) {
        if (put->request->uid_given)
                entry.uid = put->request->uid;
        if (put->request->gid_given)
                entry.gid = put->request->gid;
}

/* Without privileges files belong to who runs the agent, as with tar. Whose the directory is may have put another name
 * of somebody else's file in the place of what we have just made, which has no second name. */
static int set_owner(int parent_fd, const char *name, mode_t type) {
        _cleanup_close_ int fd = -1;
        struct stat made;

        if (geteuid() != 0)
                return 0;
        fd = openat(parent_fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
        if (fd < 0 || fstat(fd, &made) < 0)
                return -errno;
        if ((made.st_mode & S_IFMT) != type || made.st_nlink != 1)
                return -EEXIST;
        return fchownat(fd, "", entry.uid, entry.gid, AT_EMPTY_PATH) < 0 ? -errno : 0;
}

static int set_time(int parent_fd, const char *name) {
        struct timespec times[2] = {
                { .tv_nsec = UTIME_OMIT },
                { .tv_sec = entry.mtime_s, .tv_nsec = (long) entry.mtime_ns },
        };

        return utimensat(parent_fd, name, times, AT_SYMLINK_NOFOLLOW) < 0 ? -errno : 0;
}

/* A file system without extended attributes is no reason to refuse the file. */
static int set_xattrs(int fd) {
        const char *name;
        const void *value;
        size_t cursor = 0, size;

        while (xattrs_next(&entry.xattrs, &cursor, &name, &value, &size))
                if (fsetxattr(fd, name, value, size, 0) < 0 && errno != EOPNOTSUPP)
                        return -errno;
        return 0;
}

static int remove_old(int parent_fd, const char *name) {
        if (unlinkat(parent_fd, name, 0) < 0 && errno != ENOENT)
                return -errno;
        return 0;
}

static int write_content(struct put *put, int fd) {
        for (;;) {
                const uint8_t *data;
                size_t size;
                int r = tar_content(&reader, &data, &size);

                if (r < 0 || size == 0)
                        return r;
                r = write_all(fd, data, size);
                if (r < 0)
                        return r;
                put->bytes += size;
        }
}

static int apply_mode(int fd, mode_t mode, const struct timespec *mtime) {
        struct timespec times[2] = { { .tv_nsec = UTIME_OMIT }, *mtime };

        if (fchmod(fd, mode) < 0 || futimens(fd, times) < 0)
                return -errno;
        return 0;
}

/* The order matters: changing the owner clears setuid bits and file capabilities. */
static int put_file(struct put *put, int parent_fd, const char *name) {
        struct timespec mtime = { .tv_sec = entry.mtime_s, .tv_nsec = (long) entry.mtime_ns };
        _cleanup_close_ int fd = -1;
        int r = remove_old(parent_fd, name);

        if (r < 0)
                return r;
        fd = openat(parent_fd, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (fd < 0)
                return -errno;
        r = write_content(put, fd);
        if (r >= 0 && geteuid() == 0 && fchown(fd, entry.uid, entry.gid) < 0)
                r = -errno;
        if (r >= 0)
                r = set_xattrs(fd);
        return r < 0 ? r : apply_mode(fd, entry.mode, &mtime);
}

static int defer_directory(struct put *put, int fd) {
        struct timespec mtime = { .tv_sec = entry.mtime_s, .tv_nsec = (long) entry.mtime_ns };
        size_t size = sizeof(struct deferred) + strlen(entry.path) + 1;
        struct deferred *deferred = put->deferred_size + size <= DEFERRED_MAX ? malloc(size) : NULL;

        if (!deferred)
                return apply_mode(fd, entry.mode, &mtime);
        *deferred = (struct deferred) { .next = put->deferred, .mode = entry.mode, .mtime = mtime };
        memcpy(deferred->path, entry.path, strlen(entry.path) + 1);
        put->deferred = deferred;
        put->deferred_size += size;
        return 0;
}

static int set_up_directory(struct put *put, int fd) {
        int r;

        if (geteuid() == 0 && fchown(fd, entry.uid, entry.gid) < 0)
                return -errno;
        r = set_xattrs(fd);
        return r < 0 ? r : defer_directory(put, fd);
}

static int open_directory(struct put *put, int parent_fd, const char *name) {
        struct stat found;
        int fd;

        if (mkdirat(parent_fd, name, 0700) < 0) {
                if (errno != EEXIST)
                        return -errno;
                /* A link to a directory counts as that directory only where links are followed. */
                if (fstatat(parent_fd, name, &found, put->request->follow_links ? 0 : AT_SYMLINK_NOFOLLOW) < 0 ||
                    !S_ISDIR(found.st_mode)) {
                        if (unlinkat(parent_fd, name, 0) < 0 || mkdirat(parent_fd, name, 0700) < 0)
                                return -errno;
                } else if (put->request->follow_links && fstatat(parent_fd, name, &found, AT_SYMLINK_NOFOLLOW) == 0 &&
                           S_ISLNK(found.st_mode))
                        return -EALREADY;
        }
        fd = openat(parent_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        return fd < 0 ? -errno : fd;
}

static int put_directory(struct put *put, int parent_fd, const char *name) {
        _cleanup_close_ int fd = open_directory(put, parent_fd, name);

        if (fd == -EALREADY) /* the directory behind a link keeps what it has */
                return 0;
        return fd < 0 ? fd : set_up_directory(put, fd);
}

static int put_top(struct put *put) {
        _cleanup_close_ int fd = openat(put->beneath.root_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

        return fd < 0 ? -errno : set_up_directory(put, fd);
}

static int put_hardlink(struct put *put, int parent_fd, const char *name) {
        _cleanup_close_ int link_parent = -1, own_parent = fcntl(parent_fd, F_DUPFD_CLOEXEC, 0);
        const char *link_name;
        struct stat found, old;
        int r, fd;

        if (own_parent < 0)
                return -errno;
        r = path_normalize(entry.link);
        if (r < 0)
                return r;
        if (!path_strip(entry.link, put->request->strip) || *entry.link == 0)
                return -EBADMSG;
        r = beneath_parent(&put->beneath, entry.link, false, &fd, &link_name);
        if (r < 0)
                return r;
        link_parent = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        if (link_parent < 0 || fstatat(link_parent, link_name, &found, AT_SYMLINK_NOFOLLOW) < 0)
                return -errno;
        if (fstatat(own_parent, name, &old, AT_SYMLINK_NOFOLLOW) == 0 && old.st_dev == found.st_dev &&
            old.st_ino == found.st_ino)
                return 0;
        r = remove_old(own_parent, name);
        if (r < 0)
                return r;
        return linkat(link_parent, link_name, own_parent, name, 0) < 0 ? -errno : 0;
}

static int put_symlink(int parent_fd, const char *name) {
        int r = remove_old(parent_fd, name);

        if (r < 0)
                return r;
        if (symlinkat(entry.link, parent_fd, name) < 0)
                return -errno;
        r = set_owner(parent_fd, name, S_IFLNK);
        return r < 0 ? r : set_time(parent_fd, name);
}

static mode_t node_type(char type) {
        switch (type) {
        case TAR_CHARACTER:
                return S_IFCHR;
        case TAR_BLOCK_DEVICE:
                return S_IFBLK;
        default:
                return S_IFIFO;
        }
}

static int put_node(int parent_fd, const char *name) {
        int r = remove_old(parent_fd, name);

        if (r < 0)
                return r;
        if (mknodat(parent_fd, name, node_type(entry.type) | entry.mode, makedev(entry.major, entry.minor)) < 0)
                return -errno;
        r = set_owner(parent_fd, name, node_type(entry.type));
        return r < 0 ? r : set_time(parent_fd, name);
}

static int put_entry(struct put *put) {
        const char *name;
        int parent_fd, r;

        r = path_normalize(entry.path);
        if (r < 0)
                return r;
        if (!path_strip(entry.path, put->request->strip))
                return 0;
        choose_owner(put);
        put->entries++;
        if (*entry.path == 0)
                return entry.type == TAR_DIRECTORY ? put_top(put) : -EBADMSG;
        r = beneath_parent(&put->beneath, entry.path, true, &parent_fd, &name);
        if (r < 0)
                return r;
        switch (entry.type) {
        case TAR_FILE:
                return put_file(put, parent_fd, name);
        case TAR_DIRECTORY:
                return put_directory(put, parent_fd, name);
        case TAR_HARDLINK:
                return put_hardlink(put, parent_fd, name);
        case TAR_SYMLINK:
                return put_symlink(parent_fd, name);
        default:
                return put_node(parent_fd, name);
        }
}

static int open_deferred(struct put *put, const char *path) {
        const char *name;
        int parent_fd, fd, r;

        if (*path == 0) {
                fd = openat(put->beneath.root_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
                return fd < 0 ? -errno : fd;
        }
        r = beneath_parent(&put->beneath, path, false, &parent_fd, &name);
        if (r < 0)
                return r;
        fd = openat(parent_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        return fd < 0 ? -errno : fd;
}

/* A later member may have put something else in the place of a directory: then there is nothing to set. */
static void apply_deferred(struct put *put) {
        while (put->deferred) {
                struct deferred *deferred = put->deferred;
                _cleanup_close_ int fd = open_deferred(put, deferred->path);

                if (fd >= 0)
                        (void) apply_mode(fd, deferred->mode, &deferred->mtime);
                put->deferred = deferred->next;
                free(deferred);
        }
}

static int report(struct put *put, int error) {
        const char *what = *entry.path ? entry.path : "the archive";

        if (error == -EBADMSG)
                return conn_fail(put->conn, code_of_errno(EBADMSG),
                                 "cannot unpack %.500s: this is no tar archive, or a damaged one", what);
        if (error == -EPROTO)
                return conn_fail(put->conn, "protocol_error", "unexpected frame in the archive's stream");
        if (error == -ECONNRESET)
                return error;
        return conn_fail_errno(put->conn, -error, "cannot unpack %.500s", what);
}

static int unpack(struct put *put) {
        int r;

        while ((r = tar_next(&reader, &entry)) > 0) {
                r = put_entry(put);
                if (r < 0)
                        return r;
        }
        apply_deferred(put);
        return r < 0 ? r : tar_finish(&reader);
}

int serve_put(struct conn *conn, struct frame *frame) {
        struct put_request request = { 0 };
        struct put put = { .conn = conn, .request = &request, .beneath = { .root_fd = -1, .parent_fd = -1 } };
        struct builder builder = { 0 };
        char path[PATH_MAX];
        int r;

        if (parse_request(frame, &request) < 0)
                return conn_bad_request(conn, "malformed put request");
        /* The next frame takes the buffer that the request lies in. */
        if (strlen(request.path) >= sizeof path)
                return conn_bad_request(conn, "path too long");
        memcpy(path, request.path, strlen(request.path) + 1);
        r = beneath_open(&put.beneath, path, request.follow_links, request.make_directory);
        if (r < 0) {
                beneath_close(&put.beneath);
                return conn_fail_errno(conn, -r, "cannot open %.500s", path);
        }
        umask(0); /* a node gets its mode when it is made: setting it later by name could go through a link */
        reader.source = next_piece;
        reader.context = &put;
        r = unpack(&put);
        apply_deferred(&put);
        beneath_close(&put.beneath);
        if (r < 0)
                return report(&put, r);
        builder_u64(&builder, TAG_ENTRIES, put.entries);
        builder_u64(&builder, TAG_BYTES, put.bytes);
        return conn_reply(conn, FRAME_REPLY, &builder);
}
