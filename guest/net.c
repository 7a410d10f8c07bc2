/* SPDX-License-Identifier: MIT */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "io.h"
#include "log.h"
#include "net.h"

static int request_for(const char *device, const char *address, struct ifreq *ret) {
        struct sockaddr_in in = { .sin_family = AF_INET };

        *ret = (struct ifreq) { 0 };
        snprintf(ret->ifr_name, sizeof ret->ifr_name, "%s", device);
        if (address && inet_pton(AF_INET, address, &in.sin_addr) != 1)
                return -EINVAL;
        memcpy(&ret->ifr_addr, &in, sizeof in);
        return 0;
}

static int device_up(int fd, const char *device) {
        struct ifreq request;

        (void) request_for(device, NULL, &request);
        if (ioctl(fd, SIOCGIFFLAGS, &request) < 0)
                return -errno;
        if (request.ifr_flags & IFF_UP)
                return 0;
        request.ifr_flags |= IFF_UP;
        return ioctl(fd, SIOCSIFFLAGS, &request) < 0 ? -errno : 0;
}

static int set_address(int fd, const char *device, unsigned long what, const char *address) {
        struct ifreq request;
        int r = request_for(device, address, &request);

        if (r < 0)
                return r;
        return ioctl(fd, (int) what, &request) < 0 ? -errno : 0;
}

static bool has_address(int fd, const char *device) {
        struct ifreq request;

        (void) request_for(device, NULL, &request);
        return ioctl(fd, SIOCGIFADDR, &request) == 0;
}

static int add_default_route(int fd, const char *gateway) {
        struct rtentry route = { .rt_flags = RTF_UP | RTF_GATEWAY };
        struct sockaddr_in to = { .sin_family = AF_INET };

        memcpy(&route.rt_dst, &to, sizeof to);
        memcpy(&route.rt_genmask, &to, sizeof to);
        if (inet_pton(AF_INET, gateway, &to.sin_addr) != 1)
                return -EINVAL;
        memcpy(&route.rt_gateway, &to, sizeof to);
        return ioctl(fd, SIOCADDRT, &route) < 0 && errno != EEXIST ? -errno : 0;
}

void net_loopback_up(void) {
        _cleanup_close_ int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

        if (fd < 0 || set_address(fd, "lo", SIOCSIFADDR, "127.0.0.1") < 0 || device_up(fd, "lo") < 0)
                log_line(LEVEL_WARNING, "cannot set up the loopback device: %s", strerror(errno));
}

static int configure(int fd, const char *device, const struct ip_config *ip) {
        int r = set_address(fd, device, SIOCSIFADDR, ip->address);

        if (r >= 0 && *ip->netmask)
                r = set_address(fd, device, SIOCSIFNETMASK, ip->netmask);
        if (r >= 0)
                r = device_up(fd, device);
        if (r >= 0 && *ip->gateway)
                r = add_default_route(fd, ip->gateway);
        return r;
}

void net_configure(const struct ip_config *ip) {
        _cleanup_close_ int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        const char *device = *ip->device ? ip->device : "eth0";
        int r;

        if (fd < 0 || !*ip->address || if_nametoindex(device) == 0 || has_address(fd, device))
                return;
        r = configure(fd, device, ip);
        if (r < 0)
                log_line(LEVEL_ERROR, "cannot configure %s: %s", device, strerror(-r));
}

static void set_sysctl6(const char *device, const char *name, const char *value) {
        char path[96];

        snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/%s", device, name);
        if (write_file(path, value, O_WRONLY) < 0)
                log_line(LEVEL_WARNING, "cannot set %s: %s", path, strerror(errno));
}

/* As the kernel has them (linux/ipv6.h); its header and the C library's do not go together. */
struct address6 {
        struct in6_addr address;
        uint32_t prefix_length;
        int device;
};

struct route6 {
        struct in6_addr to, from, gateway;
        uint32_t type;
        uint16_t to_length, from_length;
        uint32_t metric;
        unsigned long info;
        uint32_t flags;
        int device;
};

static int add_address6(int fd, int device, const struct ip6_config *ip) {
        struct address6 request = { .prefix_length = ip->prefix_length, .device = device };

        if (inet_pton(AF_INET6, ip->address, &request.address) != 1)
                return -EINVAL;
        return ioctl(fd, SIOCSIFADDR, &request) < 0 && errno != EEXIST ? -errno : 0;
}

static int add_default_route6(int fd, int device, const char *gateway) {
        struct route6 route = { .metric = 1024, .flags = RTF_UP | RTF_GATEWAY, .device = device };

        if (inet_pton(AF_INET6, gateway, &route.gateway) != 1)
                return -EINVAL;
        return ioctl(fd, SIOCADDRT, &route) < 0 && errno != EEXIST ? -errno : 0;
}

static int configure6(int fd, const char *device, int number, const struct ip6_config *ip) {
        int r;

        set_sysctl6(device, "accept_ra", "0");
        /* Nobody on this link can have our address too. */
        set_sysctl6(device, "accept_dad", "0");
        r = device_up(fd, device);
        if (r >= 0)
                r = add_address6(fd, number, ip);
        if (r >= 0 && *ip->gateway)
                r = add_default_route6(fd, number, ip->gateway);
        return r;
}

void net_configure6(const char *device, const struct ip6_config *ip) {
        _cleanup_close_ int fd = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        int r, number = (int) if_nametoindex(device);

        if (number == 0)
                return;
        r = fd < 0 ? -errno : configure6(fd, device, number, ip);
        if (r < 0)
                log_line(LEVEL_ERROR, "cannot configure IPv6 on %s: %s", device, strerror(-r));
}

/* What an image has of its own is left alone. */
static void write_where_empty(const char *path, const char *text) {
        struct stat status;

        if (stat(path, &status) == 0 && status.st_size > 0)
                return;
        if (write_file(path, text, O_CREAT | O_TRUNC) < 0)
                log_line(LEVEL_WARNING, "cannot write %s: %s", path, strerror(errno));
}

void net_write_resolver(const struct config *config) {
        char text[256] = "";
        size_t used = 0;

        for (size_t i = 0; i < config->dns_count; i++)
                used += (size_t) snprintf(text + used, sizeof text - used, "nameserver %s\n", config->dns[i]);
        if (config->dns_count > 0)
                write_where_empty("/etc/resolv.conf", text);
}

/* Who makes containers writes it there, so their images have none; no C library knows the name by itself. */
void net_write_hosts(void) {
        write_where_empty("/etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
}
