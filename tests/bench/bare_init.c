/* The smallest guest that can be compared with ours: loads the modules of vsock, connects to the
 * host, and is done. It is PID 1 of an initrd that holds nothing else.
 *
 * The host's port is bare_port= on the kernel's command line, which the kernel hands to init as a
 * variable of its environment. /etc/modules lists the modules in the order of their loading.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static void load_modules(void)
{
    char line[256];
    FILE *list = fopen("/etc/modules", "r");

    while (list && fgets(line, sizeof line, list)) {
        line[strcspn(line, "\n")] = 0;
        int fd = open(line, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0)
            perror(line);
        close(fd);
    }
}

static int connect_host(unsigned port)
{
    struct sockaddr_vm host = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port,
    };
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

    return fd < 0 ? -1 : connect(fd, (struct sockaddr *)&host, sizeof host);
}

int main(void)
{
    const char *port = getenv("bare_port");
    const struct timespec moment = { .tv_nsec = 1000000 };

    load_modules();
    for (int tries = 0; tries < 1000 && connect_host(port ? atoi(port) : 1030) < 0; tries++)
        nanosleep(&moment, NULL);
    for (;;)
        pause();
}
