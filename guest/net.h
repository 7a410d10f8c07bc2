/* SPDX-License-Identifier: MIT */
/* Configures the guest's network where the kernel has not (ip= needs IP_PNP, which many kernels lack). */
#pragma once

#include "config.h"

void net_loopback_up(void);
/* Without the device there is nothing to do: a VM may have no network. */
void net_configure(const struct ip_config *ip);
void net_write_resolver(const struct config *config);
