/* SPDX-License-Identifier: MIT */
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "io.h"
#include "machine.h"

void machine_boot_id(char *ret) {
        ssize_t n = read_file("/proc/sys/kernel/random/boot_id", ret, BOOT_ID_SIZE);

        if (n < 0)
                *ret = 0;
        ret[strcspn(ret, "\n")] = 0;
}

static bool same_program(const char *a, const char *b) {
        struct stat one, other;

        return stat(a, &one) == 0 && stat(b, &other) == 0 && one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

enum init_kind machine_init_kind(void) {
        char name[32], program[256];
        ssize_t n;

        if (same_program("/proc/1/exe", "/proc/self/exe"))
                return INIT_OWN;
        /* At the end it becomes systemd-shutdown. */
        if (read_file("/proc/1/comm", name, sizeof name) > 0 && strncmp(name, "systemd", 7) == 0)
                return INIT_SYSTEMD;
        n = readlink("/proc/1/exe", program, sizeof program - 1);
        if (n > 0) {
                program[n] = 0;
                if (strstr(program, "/busybox"))
                        return INIT_BUSYBOX;
        }
        return INIT_OTHER;
}

const char *init_kind_name(enum init_kind kind) {
        switch (kind) {
        case INIT_OWN:
                return "own";
        case INIT_SYSTEMD:
                return "systemd";
        default:
                return "other";
        }
}

bool machine_read_notification(int fd) {
        char text[4096], control[CMSG_SPACE(sizeof(struct ucred))];
        struct iovec part = { .iov_base = text, .iov_len = sizeof text - 1 };
        struct msghdr message = {
                .msg_iov = &part,
                .msg_iovlen = 1,
                .msg_control = control,
                .msg_controllen = sizeof control,
        };
        ssize_t n = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        struct cmsghdr *item;
        struct ucred sender;

        if (n <= 0)
                return false;
        text[n] = 0;
        item = CMSG_FIRSTHDR(&message);
        if (!item || item->cmsg_level != SOL_SOCKET || item->cmsg_type != SCM_CREDENTIALS)
                return false;
        memcpy(&sender, CMSG_DATA(item), sizeof sender);
        return sender.pid == 1 && (strncmp(text, "READY=1", 7) == 0 || strstr(text, "\nREADY=1"));
}
