/* What this processor can do at most, for longer than a moment: multiply-adds in registers, and reading memory.
 *
 *     cc -O3 -march=native -ffp-contract=fast -pthread limits.c -o limits && ./limits THREADS
 *
 * One line of JSON.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__AVX512F__)
#define BYTES 64
#define ACCUMULATORS 24
#elif defined(__AVX__)
#define BYTES 32
#define ACCUMULATORS 12
#else
#define BYTES 16
#define ACCUMULATORS 12
#endif

typedef float vector __attribute__((vector_size(BYTES)));

enum { LANES = BYTES / sizeof(float), STEPS = 2000000, REPEATS = 5 };

/* Larger than last-level caches are. */
static const size_t MEMORY = (size_t)1 << 30;

typedef struct {
    const vector *memory;
    size_t count;
    vector half, result;
} task;

/* Unrolled, so that the sums are registers. */
#define EACH(count) _Pragma("GCC unroll 32") for (int i = 0; i < (count); i++)

/* Independent chains of multiply-adds, as many as hide their latency. Values converge to 1, far from denormals. */
static void *multiply_add(void *argument) {
    task *own = argument;
    const vector half = own->half;
    vector sums[ACCUMULATORS];
    EACH(ACCUMULATORS) sums[i] = half * (float)i;
    for (long step = 0; step < STEPS; step++) EACH(ACCUMULATORS) sums[i] = sums[i] * half + half;
    own->result = half;
    EACH(ACCUMULATORS) own->result += sums[i];
    return NULL;
}

static void *read_memory(void *argument) {
    task *own = argument;
    vector sums[8] = {0};
    for (size_t at = 0; at + 8 <= own->count; at += 8) EACH(8) sums[i] += own->memory[at + i];
    own->result = own->half;
    EACH(8) own->result += sums[i];
    return NULL;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static int compare(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

/* Seconds of a repetition, the median, on all threads at once. A processor that has rested is faster at first. */
static double typical(void *(*work)(void *), task *tasks, int threads) {
    double seconds[REPEATS];
    pthread_t *running = malloc(threads * sizeof *running);
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        double began = now();
        for (int i = 0; i < threads; i++) pthread_create(&running[i], NULL, work, &tasks[i]);
        for (int i = 0; i < threads; i++) pthread_join(running[i], NULL);
        seconds[repeat] = now() - began;
    }
    free(running);
    qsort(seconds, REPEATS, sizeof *seconds, compare);
    return seconds[REPEATS / 2];
}

int main(int count, char **arguments) {
    int threads = count > 1 ? atoi(arguments[1]) : 1;
    task *tasks = threads < 1 ? NULL : aligned_alloc(64, threads * sizeof *tasks);
    if (!tasks) return 1;
    memset(tasks, 0, threads * sizeof *tasks);

    for (int i = 0; i < threads; i++)
        for (int lane = 0; lane < LANES; lane++) tasks[i].half[lane] = 0.5f;
    double compute = typical(multiply_add, tasks, threads);
    double flops = 2.0 * STEPS * ACCUMULATORS * LANES * threads / compute;

    char *memory = aligned_alloc(4096, MEMORY);
    if (!memory) return 1;
    memset(memory, 0, MEMORY);
    size_t share = MEMORY / threads / BYTES;
    for (int i = 0; i < threads; i++) {
        tasks[i].memory = (const vector *)memory + i * share;
        tasks[i].count = share;
    }
    double reading = typical(read_memory, tasks, threads);

    float seen = 0;
    for (int i = 0; i < threads; i++) seen += tasks[i].result[0];
    fprintf(stderr, "%g\n", seen); /* so that no work is left out */
    printf("{\"flops\": %.0f, \"bytes\": %.0f}\n", flops, (double)share * BYTES * threads / reading);
    return 0;
}
