/* SPDX-License-Identifier: MIT */
/* banger-enter: runs on the host as root, enters a control group, becomes a user if told, and then the program.
 *
 * usage: banger-enter PROCS UID PROGRAM [ARGUMENT...]    (PROCS: a descriptor of the group's cgroup.procs)
 *
 * So the program is in its group before its first instruction, and the helper forks nothing of its own size. */
#include <errno.h>
#include <grp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FAILED = 126 };

static int fail(const char *what) {
        dprintf(STDERR_FILENO, "banger-enter: %s: %s\n", what, strerror(errno));
        return FAILED;
}

/* The gid is the same number. */
static int become(unsigned long id) {
        if (setgroups(0, NULL) < 0 || setresgid((gid_t) id, (gid_t) id, (gid_t) id) < 0 ||
            setresuid((uid_t) id, (uid_t) id, (uid_t) id) < 0)
                return -1;
        return 0;
}

static int parse(const char *text, unsigned long *ret) {
        char *end;

        if (*text < '0' || *text > '9')
                return -1;
        errno = 0;
        *ret = strtoul(text, &end, 10);
        return errno == 0 && *end == 0 && *ret < UINT32_MAX ? 0 : -1;
}

int main(int argc, char **argv) {
        unsigned long number, id;
        int procs;

        if (argc < 4 || parse(argv[1], &number) < 0 || parse(argv[2], &id) < 0)
                return 2;
        procs = (int) number;
        if (write(procs, "0", 1) != 1)
                return fail("cannot enter the control group");
        close(procs);
        if (id != 0 && become(id) < 0)
                return fail("cannot become the user");
        (void) execv(argv[3], argv + 3);
        return fail(argv[3]);
}
