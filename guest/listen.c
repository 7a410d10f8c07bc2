/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "listen.h"
#include "log.h"
#include "macro.h"

int listen_vsock(unsigned port) {
        struct sockaddr_vm address = {
                .svm_family = AF_VSOCK,
                .svm_port = port,
                .svm_cid = VMADDR_CID_ANY,
        };
        _cleanup_close_ int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

        if (fd < 0)
                return -errno;
        if (bind(fd, (struct sockaddr *) &address, sizeof address) < 0 || listen(fd, SOMAXCONN) < 0)
                return -errno;
        return take_fd(&fd);
}

static bool peer_is_host(int fd) {
        struct sockaddr_vm address;
        socklen_t size = sizeof address;

        return getpeername(fd, (struct sockaddr *) &address, &size) == 0 && address.svm_family == AF_VSOCK &&
               address.svm_cid == VMADDR_CID_HOST;
}

static bool peer_is_ourselves(int fd) {
        struct ucred peer;
        socklen_t size = sizeof peer;

        return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == geteuid();
}

int accept_host(int listen_fd, bool given) {
        _cleanup_close_ int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (fd < 0)
                return -1;
        if (given ? !peer_is_ourselves(fd) : !peer_is_host(fd)) {
                log_line(LEVEL_WARNING, "refused a connection that is not the host's");
                return -1;
        }
        return take_fd(&fd);
}
