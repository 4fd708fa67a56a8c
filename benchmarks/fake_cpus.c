/* Preloaded, tells a program that this machine has $FAKE_CPUS processors. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <unistd.h>

static int cpus(void)
{
    const char *text = getenv("FAKE_CPUS");
    return text ? atoi(text) : 1;
}

long sysconf(int name)
{
    long (*next)(int) = dlsym(RTLD_NEXT, "sysconf");
    return name == _SC_NPROCESSORS_ONLN || name == _SC_NPROCESSORS_CONF ? cpus() : next(name);
}

int get_nprocs(void) { return cpus(); }

int get_nprocs_conf(void) { return cpus(); }

int sched_getaffinity(pid_t pid, size_t size, cpu_set_t *mask)
{
    (void)pid;
    memset(mask, 0, size);
    for (int cpu = 0; cpu < cpus() && (size_t)cpu < size * 8; cpu++)
        CPU_SET_S(cpu, size, mask);
    return 0;
}
