/* SPDX-License-Identifier: MIT */
/* Configures the guest's network where the kernel has not (ip= needs IP_PNP, which many kernels lack). */
#pragma once

#include "config.h"

void net_loopback_up(void);
/* Without the device there is nothing to do: a VM may have no network. */
void net_configure(const struct ip_config *ip);
/* After net_configure. No router is listened to: the host has said what there is to know. */
void net_configure6(const char *device, const struct ip6_config *ip);
void net_write_resolver(const struct config *config);
void net_write_hosts(void);
