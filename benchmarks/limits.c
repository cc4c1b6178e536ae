/* What this processor can do at most, for longer than a moment: multiply-adds in registers (of f32, of bf16 and of bytes
 * with the vector instructions for them, and with those for tiles), and reading memory; and how far apart two cores are.
 *
 *     cc -O3 -march=native -ffp-contract=fast -pthread limits.c -o limits && echo | ./limits THREADS [BYTES]
 *
 * BYTES is how much memory is read again and again, by default more than caches hold. For each line of input it measures
 * and gives a line of JSON. It keeps its memory meanwhile: a system that is given a gigabyte back, and gives it to its
 * host, was seen to slow down all others for seconds.
 */
#define _GNU_SOURCE
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

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

enum { LANES = BYTES / sizeof(float), STEPS = 2000000, REPEATS = 5, TRIPS = 10000 };

static const size_t MEMORY = (size_t)1 << 30, PAGE = (size_t)1 << 21;

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

#if defined(__AVX512BF16__)
static void *dot_bf16(void *argument) {
    task *own = argument;
    const __m512bh half = (__m512bh)_mm512_set1_epi16(0x3f00); /* 0.5 */
    __m512 sums[ACCUMULATORS];
    EACH(ACCUMULATORS) sums[i] = _mm512_set1_ps((float)i);
    for (long step = 0; step < STEPS; step++) EACH(ACCUMULATORS) {
            sums[i] = _mm512_dpbf16_ps(sums[i], half, half);
            __asm__ volatile("" : "+v"(sums[i]));
        }
    own->result = own->half;
    EACH(ACCUMULATORS) own->result += (vector)sums[i];
    return NULL;
}
#endif

#if defined(__AVX512VNNI__)
static void *dot_int8(void *argument) {
    task *own = argument;
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sums[ACCUMULATORS];
    EACH(ACCUMULATORS) sums[i] = _mm512_set1_epi32(i);
    for (long step = 0; step < STEPS; step++) EACH(ACCUMULATORS) {
            sums[i] = _mm512_dpbusd_epi32(sums[i], ones, ones);
            __asm__ volatile("" : "+v"(sums[i]));
        }
    own->result = own->half;
    EACH(ACCUMULATORS) own->result += (vector)_mm512_cvtepi32_ps(sums[i]);
    return NULL;
}
#endif

#if defined(__AMX_TILE__) && defined(__linux__)
enum { TILE_STEPS = STEPS / 16, TILES = 4, TILE_PRODUCTS = 16 * 16 * 16 * TILES };

/* Linux gives a process tiles when it asks for them. */
static int tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

static void configure(void) {
    struct { unsigned char palette, start, reserved[14]; unsigned short columns[16]; unsigned char rows[16]; } shapes = {1};
    for (int i = 0; i < 8; i++) shapes.columns[i] = 64, shapes.rows[i] = 16;
    __asm__ volatile("" : : "r"(&shapes) : "memory"); /* some compilers think that a part of it is read */
    _tile_loadconfig(&shapes);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); _tile_zero(4); _tile_zero(5);
}

static void *tile_bf16(void *argument) {
    (void)argument;
    configure();
    for (long step = 0; step < TILE_STEPS; step++) {
        _tile_dpbf16ps(0, 4, 5); _tile_dpbf16ps(1, 4, 5); _tile_dpbf16ps(2, 4, 5); _tile_dpbf16ps(3, 4, 5);
    }
    _tile_release();
    return NULL;
}

static void *tile_int8(void *argument) {
    (void)argument;
    configure();
    for (long step = 0; step < TILE_STEPS; step++) {
        _tile_dpbssd(0, 4, 5); _tile_dpbssd(1, 4, 5); _tile_dpbssd(2, 4, 5); _tile_dpbssd(3, 4, 5);
    }
    _tile_release();
    return NULL;
}
#endif

static void *read_memory(void *argument) {
    task *own = argument;
    vector sums[8] = {0};
    for (size_t at = 0; at + 8 <= own->count; at += 8) EACH(8) sums[i] += own->memory[at + i];
    own->result = own->half;
    EACH(8) own->result += sums[i];
    return NULL;
}

/* A line of memory goes to the other core and comes back. */
static _Alignas(128) atomic_int trips;

static void *go(void *argument) {
    (void)argument;
    for (int i = 0; i < TRIPS; i++) {
        atomic_store(&trips, 2 * i + 1);
        while (atomic_load(&trips) == 2 * i + 1) {}
    }
    return NULL;
}

static void *come_back(void *argument) {
    (void)argument;
    for (int i = 0; i < TRIPS; i++) {
        while (atomic_load(&trips) != 2 * i + 1) {}
        atomic_store(&trips, 2 * i + 2);
    }
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

/* Begin a thread on a processor of its own: the n-th of those that this process may have. Linux begins two threads on
 * one, at times, and leaves them there for longer than a repetition takes. */
static void begin(pthread_t *thread, int n, void *(*work)(void *), task *own) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
#if defined(__linux__)
    cpu_set_t allowed, only;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        int left = n % CPU_COUNT(&allowed), processor = 0;
        while (!CPU_ISSET(processor, &allowed) || left-- > 0) processor++;
        CPU_ZERO(&only);
        CPU_SET(processor, &only);
        pthread_attr_setaffinity_np(&attributes, sizeof only, &only);
    }
#endif
    if (pthread_create(thread, &attributes, work, own) != 0) exit(1);
    pthread_attr_destroy(&attributes);
}

/* Seconds of a repetition, the median, on all threads at once. A processor that has rested is faster at first. */
static double typical(void *(*work)(void *), task *tasks, int threads) {
    double seconds[REPEATS];
    pthread_t *running = malloc(threads * sizeof *running);
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        double began = now();
        for (int i = 0; i < threads; i++) begin(&running[i], i, work, &tasks[i]);
        for (int i = 0; i < threads; i++) pthread_join(running[i], NULL);
        seconds[repeat] = now() - began;
    }
    free(running);
    qsort(seconds, REPEATS, sizeof *seconds, compare);
    return seconds[REPEATS / 2];
}

static int processors(void) {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

/* Seconds of a trip between the cores of the first two threads, the fastest of some runs; 0 where they have one. */
static double apart(int threads) {
    double least = 0;
    for (int repeat = 0; threads > 1 && processors() > 1 && repeat < REPEATS; repeat++) {
        pthread_t running[2];
        double began = now();
        atomic_store(&trips, 0);
        begin(&running[0], 0, go, NULL);
        begin(&running[1], 1, come_back, NULL);
        for (int i = 0; i < 2; i++) pthread_join(running[i], NULL);
        double seconds = (now() - began) / TRIPS;
        if (!least || seconds < least) least = seconds;
    }
    return least;
}

/* One line of JSON. */
static void measure(task *tasks, int threads, size_t bytes) {
    double products = (double)STEPS * ACCUMULATORS * LANES * threads, compute = typical(multiply_add, tasks, threads);
    double bf16 = 0, int8 = 0, bf16_tiles = 0, int8_tiles = 0; /* 0 where there is no instruction */
#if defined(__AVX512BF16__)
    bf16 = 2 * 2 * products / typical(dot_bf16, tasks, threads);
#endif
#if defined(__AVX512VNNI__)
    int8 = 2 * 4 * products / typical(dot_int8, tasks, threads);
#endif
    float seen = 0;
    for (int i = 0; i < threads; i++) seen += tasks[i].result[0];
#if defined(__AMX_TILE__) && defined(__linux__)
    if (tiles()) {
        double steps = (double)TILE_STEPS * TILE_PRODUCTS * threads;
        bf16_tiles = 2 * 2 * steps / typical(tile_bf16, tasks, threads);
        int8_tiles = 2 * 4 * steps / typical(tile_int8, tasks, threads);
    }
#endif
    double reading = typical(read_memory, tasks, threads);
    for (int i = 0; i < threads; i++) seen += tasks[i].result[0];
    fprintf(stderr, "%g\n", seen); /* so that no work is left out */
    printf("{\"flops\": %.0f, \"bytes\": %.0f, ", 2 * products / compute, bytes / reading);
    printf("\"bf16\": %.0f, \"int8\": %.0f, ", bf16, int8);
    printf("\"bf16_tiles\": %.0f, \"int8_tiles\": %.0f, ", bf16_tiles, int8_tiles);
    printf("\"apart\": %.3g}\n", apart(threads));
    fflush(stdout);
}

int main(int count, char **arguments) {
    int threads = count > 1 ? atoi(arguments[1]) : 1;
    task *tasks = threads < 1 ? NULL : aligned_alloc(64, threads * sizeof *tasks);
    size_t size = count > 2 ? strtoull(arguments[2], NULL, 10) : MEMORY;
    size_t share = threads < 1 ? 0 : size / threads / BYTES;
    char *memory = aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);
    if (!tasks || !memory || !share) return 1;
    memset(tasks, 0, threads * sizeof *tasks);
#if defined(__linux__)
    madvise(memory, size, MADV_HUGEPAGE); /* as engines may keep weights */
#endif
    memset(memory, 0, size);
    for (int i = 0; i < threads; i++) {
        for (int lane = 0; lane < LANES; lane++) tasks[i].half[lane] = 0.5f;
        tasks[i].memory = (const vector *)memory + i * share;
        tasks[i].count = share;
    }
    for (int c; (c = getchar()) != EOF;)
        if (c == '\n') measure(tasks, threads, share * BYTES * threads);
    return 0;
}
