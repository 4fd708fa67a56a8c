/* Preloaded, shows a program a node whose faults a test steers: by the numbers in the file $FAKE_NODE, read at each look. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile struct {
    long clock_step;   /* seconds */
    long first_denied; /* of the threads that a process starts in its life, counted from 1; 0: none */
    long last_denied;
} sound, *node = &sound;

__attribute__((constructor)) static void map(void)
{
    const char *file = getenv("FAKE_NODE");
    int descriptor = file ? open(file, O_RDONLY | O_CLOEXEC) : -1;
    if (descriptor < 0)
        return;
    void *mapped = mmap(NULL, sizeof *node, PROT_READ, MAP_SHARED, descriptor, 0);
    if (mapped != MAP_FAILED)
        node = mapped;
    close(descriptor);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    int (*next)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = dlsym(RTLD_NEXT, "pthread_create");
    static long started;
    long number = __atomic_add_fetch(&started, 1, __ATOMIC_RELAXED);
    return node->first_denied && number >= node->first_denied && number <= node->last_denied ? EAGAIN : next(thread, attributes, run, argument);
}

/* The monotonic clocks stay as they are. So does the kernel's clock of the day: who waits until a moment of that clock
   waits for hours too long or not at all, as when the clock is stepped during the wait. */
int clock_gettime(clockid_t clock, struct timespec *now)
{
    int failed = syscall(SYS_clock_gettime, clock, now) != 0;
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += node->clock_step;
    return failed ? -1 : 0;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    int failed = syscall(SYS_gettimeofday, now, zone) != 0;
    if (!failed)
        now->tv_sec += node->clock_step;
    return failed ? -1 : 0;
}

time_t time(time_t *now)
{
    struct timespec moment;
    clock_gettime(CLOCK_REALTIME, &moment);
    if (now)
        *now = moment.tv_sec;
    return moment.tv_sec;
}
