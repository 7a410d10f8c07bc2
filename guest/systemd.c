/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io.h"
#include "log.h"
#include "systemd.h"

#define RUNTIME_UNITS "/run/systemd/system"

static const char *const unit_directories[] = { "/usr/lib/systemd/system", "/lib/systemd/system" };
static const char *const udevs[] = { "/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd" };

/* Masked where the image has the unit, or the template that it is an instance of. */
static const struct {
        const char *unit, *template;
        bool needs_udev;
} masked[] = {
        /* The network is configured already, and not by them: they would wait until their time is over. */
        { "systemd-networkd-wait-online.service", NULL, false },
        { "NetworkManager-wait-online.service", NULL, false },
        /* Asks its questions on a console that nobody sees. */
        { "systemd-firstboot.service", NULL, false },
        /* Waits 90 s for a device that only udev announces. */
        { "serial-getty@ttyS0.service", "serial-getty@.service", true },
};

/* Firecracker leaves at a reset; after a power-off or halt the machine would stand still and be called running. */
static const char *const ends[] = { "poweroff.target", "halt.target" };

bool systemd_is(const char *program) {
        char path[PATH_MAX];
        const char *name;

        if (!realpath(program, path))
                return false;
        name = strrchr(path, '/');
        return name && strcmp(name, "/systemd") == 0;
}

static bool find_unit(const char *file, char *ret, size_t size) {
        for (size_t i = 0; i < ELEMENTSOF(unit_directories); i++) {
                snprintf(ret, size, "%s/%s", unit_directories[i], file);
                if (access(ret, F_OK) == 0)
                        return true;
        }
        return false;
}

static void link_unit(const char *unit, const char *target) {
        char path[128];

        snprintf(path, sizeof path, RUNTIME_UNITS "/%s", unit);
        if (symlink(target, path) < 0 && errno != EEXIST)
                log_line(LEVEL_WARNING, "cannot write %s: %s", path, strerror(errno));
}

void systemd_prepare(void) {
        bool has_udev = access(udevs[0], X_OK) == 0 || access(udevs[1], X_OK) == 0;
        char found[128];

        (void) make_directories(RUNTIME_UNITS, 0755);
        for (size_t i = 0; i < ELEMENTSOF(masked); i++)
                if (find_unit(masked[i].template ? masked[i].template : masked[i].unit, found, sizeof found) &&
                    !(masked[i].needs_udev && has_udev))
                        link_unit(masked[i].unit, "/dev/null");
        for (size_t i = 0; find_unit("reboot.target", found, sizeof found) && i < ELEMENTSOF(ends); i++)
                link_unit(ends[i], found);
}
