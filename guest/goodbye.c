/* SPDX-License-Identifier: MIT */
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/prctl.h>

#include "goodbye.h"
#include "io.h"

/* The host looks for them: contract/guest.py. */
#define NO_CONSOLE "banger: no console in this kernel, see dmesg"
#define GOODBYE "banger: going down"

#ifdef __x86_64__
enum { SERIAL_PORT = 0x3f8 };

static bool kernel_has_console(void) {
        char names[256];

        return read_file("/sys/class/tty/console/active", names, sizeof names) < 0 || strstr(names, "ttyS0");
}

static void say(const char *line) {
        _cleanup_close_ int fd = -1;

        if (kernel_has_console())
                return;
        fd = open("/dev/port", O_WRONLY | O_CLOEXEC);
        /* The second byte of a longer write would go to the next port. */
        for (const char *byte = line; fd >= 0 && *byte; byte++)
                (void) !pwrite(fd, byte, 1, SERIAL_PORT);
}
#else
/* A processor without ports: its kernel would crash on them where no device has them. */
static void say(const char *line) {
        (void) line;
}
#endif

void goodbye_say(void) {
        say(GOODBYE "\n");
}

void _Noreturn goodbye_wait(void) {
        sigset_t end;
        int number;

        sigemptyset(&end);
        sigaddset(&end, SIGTERM);
        (void) sigprocmask(SIG_BLOCK, &end, NULL);
        (void) signal(SIGTERM, SIG_DFL);
        /* When the agent dies nobody is left to say it for us: say it early, and promise nothing. */
        (void) prctl(PR_SET_PDEATHSIG, SIGTERM);
        say(NO_CONSOLE "\n");
        (void) sigwait(&end, &number);
        goodbye_say();
        _exit(0);
}
