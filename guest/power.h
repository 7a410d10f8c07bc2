/* SPDX-License-Identifier: MIT */
/* The end of the machine. */
#pragma once

#include <sys/types.h>

#include "machine.h"

/* Signals to process 1. systemd counts from glibc's SIGRTMIN, which is 34; musl's is another. */
enum { SYSTEMD_HALT = 34 + 3, SYSTEMD_POWER_OFF = 34 + 4, SYSTEMD_REBOOT = 34 + 5 };

/* Ends every process. The agent ignores the first signal and is not waited for. */
void power_stop_everything(pid_t agent, uint64_t deadline_ms);

/* Resets the machine, its disks clean. */
void _Noreturn power_reset(void);
