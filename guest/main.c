/* SPDX-License-Identifier: MIT */
/* One binary, two roles: process 1 of the machine, and the agent that process 1 starts. */
#include <stdio.h>
#include <string.h>

#include "agent.h"
#include "init.h"

int main(int argc, char **argv) {
        if (argc > 1 && strcmp(argv[1], "agent") == 0)
                return agent_main(argc, argv);
        if (argc > 1 && strcmp(argv[1], "--version") == 0) {
                printf("%s\n", BANGER_VERSION);
                return 0;
        }
        if (getpid() == 1)
                return init_main();
        fprintf(stderr, "usage: banger-guest agent [OPTION...] | --version; without arguments only as process 1\n");
        return 2;
}
