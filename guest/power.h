/* SPDX-License-Identifier: MIT */
/* The end of the machine. */
#pragma once

#include "machine.h"

/* Ends every process, then resets. Does not return in a machine of our own. */
void power_stop_everything(uint64_t deadline_ms);
void _Noreturn power_reset(void);
