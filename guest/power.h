/* SPDX-License-Identifier: MIT */
/* The end of the machine. */
#pragma once

#include "machine.h"

/* Signals to process 1. systemd counts from glibc's SIGRTMIN, which is 34; musl's is another. */
enum { SYSTEMD_HALT = 34 + 3, SYSTEMD_POWER_OFF = 34 + 4, SYSTEMD_REBOOT = 34 + 5 };

/* Ends every process, then resets. Does not return in a machine of our own. */
void power_stop_everything(uint64_t deadline_ms);
void _Noreturn power_reset(void);
