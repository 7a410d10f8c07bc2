/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>

#include "config.h"
#include "init.h"
#include "io.h"
#include "log.h"

#define NEW_ROOT "/root"

enum { ROOT_LIMIT_MS = 10 * 1000, RAMFS_TYPE = 0x858458f6, TMPFS_TYPE = 0x01021994 };

static void load_module(const char *path) {
        _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);

        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
                log_line(LEVEL_WARNING, "cannot load %s: %s", path, strerror(errno));
}

static void load_modules(void) {
        _cleanup_(lines_close) struct lines lines = { .fd = -1 };
        char *line;

        if (lines_open(&lines, INITRAMFS_MODULES) < 0)
                return;
        while (lines_next(&lines, &line) > 0)
                if (*line)
                        load_module(line);
}

static int go_to_new_root(void) {
        static const char *const kept[] = { "/dev", "/proc", "/sys", "/run" };
        char target[64];

        for (size_t i = 0; i < ELEMENTSOF(kept); i++) {
                snprintf(target, sizeof target, NEW_ROOT "%s", kept[i]);
                (void) mkdir(target, 0755);
                if (mount(kept[i], target, NULL, MS_MOVE, NULL) < 0)
                        log_line(LEVEL_WARNING, "cannot move %s: %s", kept[i], strerror(errno));
        }
        if (chdir(NEW_ROOT) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
                return -errno;
        return 0;
}

static int mount_root(const struct cmdline *words) {
        const char *device = cmdline_value(words, "root");
        unsigned long flags = cmdline_read_only(words) ? MS_RDONLY : 0;
        int r;

        if (!device || !*device)
                device = "/dev/vda";
        r = init_wait_for(device, ROOT_LIMIT_MS);
        if (r >= 0 && mount(device, NEW_ROOT, "ext4", flags, NULL) < 0)
                r = -errno;
        if (r < 0)
                log_line(LEVEL_FATAL, "cannot mount the root disk %s: %s", device, strerror(-r));
        return r;
}

/* The files of the initramfs stay in memory that nobody can name; deleting what we were started from frees them. */
static void delete_files(void) {
        struct statfs root;

        if (statfs("/", &root) < 0 || (root.f_type != RAMFS_TYPE && root.f_type != TMPFS_TYPE))
                return;
        _cleanup_(lines_close) struct lines lines = { .fd = -1 };
        char *line;

        if (lines_open(&lines, INITRAMFS_MODULES) < 0)
                return;
        while (lines_next(&lines, &line) > 0)
                (void) unlink(line);
        (void) unlink(INITRAMFS_MODULES);
        (void) unlink("/init");
}

int initramfs_main(void) {
        static struct cmdline words;
        const char *init;
        int r;

        cmdline_load(&words);
        load_modules();
        r = mount_root(&words);
        if (r < 0)
                return r;
        delete_files();
        r = go_to_new_root();
        if (r < 0) {
                log_line(LEVEL_FATAL, "cannot go to the root disk: %s", strerror(-r));
                return r;
        }
        init = cmdline_value(&words, "init");
        if (!init || !*init)
                init = "/.banger/guest";
        (void) execl(init, init, NULL);
        log_line(LEVEL_FATAL, "cannot execute %s of the root disk: %s", init, strerror(errno));
        return -errno;
}
