// A gradient step of PPO for perceptrons, on one core: what rl/ppo/agent.py, distributions.py and loss.py say, and Adam.
//
// rl/fast/native.py compiles and calls it. Matrices lie row after row. Inside, rows are padded to whole vectors; what
// stands in the padding is never used.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

using Real = REAL;  // float, or double for tests
using Integer = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;

#ifdef __AVX512F__
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif
typedef Real Vector __attribute__((vector_size(BYTES)));
typedef Integer Bits __attribute__((vector_size(BYTES)));
constexpr int64_t WIDTH = BYTES / sizeof(Real);
constexpr int64_t PANEL = 2 * WIDTH;
constexpr int64_t CHUNK = 64;  // rows that go through the networks at once: what they leave behind fits into the cache

static Vector load(const Real* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

static void store(Real* to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

// Elements from one row to the next: whole vectors, and an odd number of cache lines, which spreads rows over the cache.
static int64_t stride(int64_t columns) {
    constexpr int64_t LINE = 64 / sizeof(Real);
    int64_t lines = (columns + LINE - 1) / LINE;
    return (lines + 1 - lines % 2) * LINE;
}

// e^x = 2^n e^r with |r| <= ½ log 2. Added to a large number, x / log 2 loses what is behind the point.
static Vector exponential(Vector x) {
    constexpr bool IS_FLOAT = sizeof(Real) == 4;
    constexpr int MANTISSA = IS_FLOAT ? 23 : 52, BIAS = IS_FLOAT ? 127 : 1023, TERMS = IS_FLOAT ? 7 : 13;
    constexpr Real LARGE = Real(3) * (Integer(1) << (MANTISSA - 1));
    Vector rounded = x * Real(1.4426950408889634) + LARGE;
    Vector r = x - (rounded - LARGE) * Real(0.6931471805599453);
    Vector large = Vector{} + LARGE, sum = Vector{} + Real(1);
    for (int term = TERMS; term > 0; --term) sum = 1 + sum * r * Real(1.0 / term);  // Σ r^k / k!
    Bits power = ((Bits)rounded - (Bits)large + BIAS) << MANTISSA;
    return sum * (Vector)power;
}

static Vector activate(Vector x, bool is_tanh) {
    if (!is_tanh) return x < 0 ? Vector{} : x;
    Vector limit = Vector{} + Real(20);
    x = x > limit ? limit : x < -limit ? -limit : x;
    return 1 - 2 / (exponential(2 * x) + 1);
}

// C += A B for R rows of C [R, V vectors]. A is [R, depth], or its transpose lies in memory.
template <bool TRANSPOSED, int R, int V>
static void multiply_block(int64_t depth, const Real* a, int64_t a_stride, const Real* b, int64_t b_stride, Real* c,
                           int64_t c_stride) {
    Vector sums[R][V];
#pragma GCC unroll 8
    for (int row = 0; row < R; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[row][v] = load(c + row * c_stride + v * WIDTH);
    for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
        for (int row = 0; row < R; ++row)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v)
                sums[row][v] += (TRANSPOSED ? a[k * a_stride + row] : a[row * a_stride + k]) *
                                load(b + k * b_stride + v * WIDTH);
    }
#pragma GCC unroll 8
    for (int row = 0; row < R; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(c + row * c_stride + v * WIDTH, sums[row][v]);
}

// The same for all rows: R at a time, then fewer.
template <bool TRANSPOSED, int R, int V>
static void multiply_rows(int64_t rows, int64_t depth, const Real* a, int64_t a_stride, const Real* b, int64_t b_stride,
                          Real* c, int64_t c_stride) {
    for (; rows >= R; rows -= R, a += R * (TRANSPOSED ? 1 : a_stride), c += R * c_stride)
        multiply_block<TRANSPOSED, R, V>(depth, a, a_stride, b, b_stride, c, c_stride);
    if constexpr (R > 1) multiply_rows<TRANSPOSED, R - 1, V>(rows, depth, a, a_stride, b, b_stride, c, c_stride);
}

// C [rows, columns] += A B. Of B, `b_panel` elements lie from one panel of columns to the next.
template <bool TRANSPOSED>
static void multiply(int64_t rows, int64_t columns, int64_t depth, const Real* a, int64_t a_stride, const Real* b,
                     int64_t b_stride, int64_t b_panel, Real* c, int64_t c_stride) {
    for (; columns > WIDTH; columns -= PANEL, b += b_panel, c += PANEL)
        multiply_rows<TRANSPOSED, 6, 2>(rows, depth, a, a_stride, b, b_stride, c, c_stride);
    if (columns > 0) multiply_rows<TRANSPOSED, 6, 1>(rows, depth, a, a_stride, b, b_stride, c, c_stride);
}

// A matrix [rows, columns] cut into panels [rows, PANEL], one after the other: what is read together lies together.
struct Panels {
    int64_t rows, columns;
    std::vector<Real> data;

    Panels(int64_t rows, int64_t columns)
        : rows(rows), columns(columns), data((columns + PANEL - 1) / PANEL * rows * PANEL) {}

    void copy(const Real* from, int64_t row_step, int64_t column_step) {
        Real* to = data.data();
        for (int64_t first = 0; first < columns; first += PANEL, from += PANEL * column_step) {
            int64_t count = std::min(PANEL, columns - first);
            for (int64_t row = 0; row < rows; ++row, to += PANEL)
                for (int64_t column = 0; column < count; ++column)
                    to[column] = from[row * row_step + column * column_step];
        }
    }

    // C [c_rows, columns] += A times this
    void multiply(int64_t c_rows, const Real* a, int64_t a_stride, Real* c, int64_t c_stride) const {
        ::multiply<false>(c_rows, columns, rows, a, a_stride, data.data(), PANEL, rows * PANEL, c, c_stride);
    }
};

// A linear layer, of weights [outputs, inputs], and what it leaves behind in a forward and a backward pass.
struct Layer {
    int64_t inputs, outputs, weight_offset, bias_offset, in_stride, out_stride;
    Panels weight, transposed;
    std::vector<Real> bias, bias_gradient;  // [outputs]
    std::vector<Real> weight_gradient;      // [outputs, inputs]
    std::vector<Real> values;               // [CHUNK, outputs], what comes out, after the activation
    std::vector<Real> slopes;               // [CHUNK, outputs], derivatives of the loss, before the activation

    Layer(int64_t inputs, int64_t outputs, int64_t weight_offset, int64_t bias_offset)
        : inputs(inputs), outputs(outputs), weight_offset(weight_offset), bias_offset(bias_offset),
          in_stride(stride(inputs)), out_stride(stride(outputs)), weight(outputs, inputs), transposed(inputs, outputs),
          bias(out_stride), bias_gradient(out_stride), weight_gradient(outputs * in_stride),
          values(CHUNK * out_stride), slopes(CHUNK * out_stride) {}

    void begin(const Real* weights) {
        weight.copy(weights + weight_offset, inputs, 1);
        transposed.copy(weights + weight_offset, 1, inputs);
        std::copy_n(weights + bias_offset, outputs, bias.data());
        std::fill(weight_gradient.begin(), weight_gradient.end(), Real(0));
        std::fill(bias_gradient.begin(), bias_gradient.end(), Real(0));
    }

    void forward(int64_t rows, const Real* from) {
        for (int64_t row = 0; row < rows; ++row) std::copy_n(bias.data(), out_stride, &values[row * out_stride]);
        transposed.multiply(rows, from, in_stride, values.data(), out_stride);
    }

    // Add to the gradients, given the slopes and what the layer was given.
    void backward(int64_t rows, const Real* from) {
        multiply<true>(outputs, inputs, rows, slopes.data(), out_stride, from, in_stride, PANEL, weight_gradient.data(),
                       in_stride);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t output = 0; output < out_stride; ++output)
                bias_gradient[output] += slopes[row * out_stride + output];
    }

    void end(Real* gradient) const {
        for (int64_t output = 0; output < outputs; ++output)
            std::copy_n(&weight_gradient[output * in_stride], inputs, gradient + weight_offset + output * inputs);
        std::copy_n(bias_gradient.data(), outputs, gradient + bias_offset);
    }
};

// Linear layers with an activation after each but the last.
struct Perceptron {
    bool is_tanh;
    std::vector<Layer> layers;

    // `sizes` are the units, [depth + 1], `offsets` those of weight and bias of each layer among all weights.
    Perceptron(bool is_tanh, int64_t depth, const int64_t* sizes, const int64_t* offsets) : is_tanh(is_tanh) {
        for (int64_t i = 0; i < depth; ++i)
            layers.emplace_back(sizes[i], sizes[i + 1], offsets[2 * i], offsets[2 * i + 1]);
    }

    Layer& last() { return layers.back(); }

    void begin(const Real* weights) {
        for (Layer& layer : layers) layer.begin(weights);
    }

    void forward(int64_t rows, const Real* from) {
        for (Layer& layer : layers) {
            layer.forward(rows, from);
            from = layer.values.data();
            if (&layer == &last()) break;
            for (int64_t i = 0; i < rows * layer.out_stride; i += WIDTH)
                store(&layer.values[i], activate(load(&layer.values[i]), is_tanh));
        }
    }

    // From the slopes of the last layer on.
    void backward(int64_t rows, const Real* from) {
        for (size_t i = layers.size() - 1; i > 0; --i) {
            Layer &layer = layers[i], &below = layers[i - 1];
            layer.backward(rows, below.values.data());
            std::fill_n(below.slopes.data(), rows * below.out_stride, Real(0));
            layer.weight.multiply(rows, layer.slopes.data(), layer.out_stride, below.slopes.data(), below.out_stride);
            for (int64_t k = 0; k < rows * below.out_stride; k += WIDTH) {
                Vector value = load(&below.values[k]), slope = load(&below.slopes[k]);
                store(&below.slopes[k], is_tanh ? slope * (1 - value * value) : value > 0 ? slope : Vector{});
            }
        }
        layers[0].backward(rows, from);
    }

    void end(Real* gradient) const {
        for (const Layer& layer : layers) layer.end(gradient);
    }
};

enum Kind : int64_t { CATEGORICAL, BERNOULLI, GAUSSIAN };

// log p(a) and H of a row, and their derivatives by the outputs of the policy, and for the Gaussian by log σ.
struct Distribution {
    Kind kind;
    std::vector<int64_t> choices;  // how many there are to choose from, for each choice of a categorical distribution
    int64_t outputs, log_std_offset;
    std::vector<Real> log_std, log_std_gradient;  // [outputs]
    Real log_prob, entropy;
    std::vector<Real> log_prob_slopes, entropy_slopes;  // [outputs], for the Gaussian [2, outputs]

    void evaluate(const Real* row, const void* actions, int64_t index) {
        log_prob = entropy = 0;
        if (kind == CATEGORICAL) {
            const int64_t* chosen = (const int64_t*)actions + index * choices.size();
            Real *log_prob_slope = log_prob_slopes.data(), *entropy_slope = entropy_slopes.data();
            for (int64_t size : choices) {
                categorical(size, row, *chosen++, log_prob_slope, entropy_slope);
                row += size, log_prob_slope += size, entropy_slope += size;
            }
        } else if (kind == BERNOULLI) {
            bernoulli(row, (const int8_t*)actions + index * outputs);
        } else {
            gaussian(row, (const Real*)actions + index * outputs);
        }
    }

    // log p = log softmax, H = -Σ p log p
    void categorical(int64_t size, const Real* logits, int64_t chosen, Real* log_prob_slope, Real* entropy_slope) {
        Real largest = *std::max_element(logits, logits + size), sum = 0, of_choice = 0;
        for (int64_t i = 0; i < size; ++i) sum += log_prob_slope[i] = std::exp(logits[i] - largest);
        Real log_sum = largest + std::log(sum);
        for (int64_t i = 0; i < size; ++i) of_choice -= log_prob_slope[i] / sum * (logits[i] - log_sum);
        for (int64_t i = 0; i < size; ++i) {
            Real p = log_prob_slope[i] / sum;
            entropy_slope[i] = -p * (logits[i] - log_sum + of_choice);
            log_prob_slope[i] = (i == chosen) - p;
        }
        log_prob += logits[chosen] - log_sum;
        entropy += of_choice;
    }

    // log p = a x - log(1 + e^x), H = log(1 + e^x) - p x, where p = 1 / (1 + e^-x)
    void bernoulli(const Real* logits, const int8_t* chosen) {
        for (int64_t i = 0; i < outputs; ++i) {
            Real x = logits[i], p = 1 / (1 + std::exp(-x));
            Real softplus = std::max(x, Real(0)) + std::log1p(std::exp(-std::abs(x)));
            log_prob += chosen[i] * x - softplus;
            entropy += softplus - p * x;
            log_prob_slopes[i] = chosen[i] - p;
            entropy_slopes[i] = -x * p * (1 - p);
        }
    }

    // log p = -½ Σ [z² + 2 log σ + log 2π], z = (a - μ) / σ, H = Σ log σ + ½ log 2πe
    void gaussian(const Real* means, const Real* actions) {
        const Real log_2pi = Real(1.8378770664093453);
        for (int64_t i = 0; i < outputs; ++i) {
            Real deviation = std::exp(log_std[i]), z = (actions[i] - means[i]) / deviation;
            log_prob -= (z * z + 2 * log_std[i] + log_2pi) / 2;
            entropy += log_std[i] + (log_2pi + 1) / 2;
            log_prob_slopes[i] = z / deviation;
            entropy_slopes[i] = 0;
            log_prob_slopes[outputs + i] = z * z - 1;
            entropy_slopes[outputs + i] = 1;
        }
    }

    void begin(const Real* weights) {
        if (kind != GAUSSIAN) return;
        std::copy_n(weights + log_std_offset, outputs, log_std.data());
        std::fill(log_std_gradient.begin(), log_std_gradient.end(), Real(0));
    }

    // Write the derivatives of the loss, given those by log p(a) and H.
    void backward(Real by_log_prob, Real by_entropy, Real* slopes) {
        for (int64_t i = 0; i < outputs; ++i)
            slopes[i] = by_log_prob * log_prob_slopes[i] + by_entropy * entropy_slopes[i];
        if (kind != GAUSSIAN) return;
        for (int64_t i = outputs; i < 2 * outputs; ++i)
            log_std_gradient[i - outputs] += by_log_prob * log_prob_slopes[i] + by_entropy * entropy_slopes[i];
    }

    void end(Real* gradient) const {
        if (kind == GAUSSIAN) std::copy_n(log_std_gradient.data(), outputs, gradient + log_std_offset);
    }
};

struct Agent {
    Perceptron actor, critic;
    Distribution distribution;
    std::vector<Real> features;  // [CHUNK, features]
};

extern "C" {

// The agent stays until the process ends.
Agent* make_agent(int64_t is_tanh, int64_t actor_depth, const int64_t* actor_sizes, const int64_t* actor_offsets,
                  int64_t critic_depth, const int64_t* critic_sizes, const int64_t* critic_offsets, int64_t kind,
                  int64_t num_choices, const int64_t* choices, int64_t log_std_offset) {
    auto reals = [](int64_t count) { return std::vector<Real>(count); };
    int64_t outputs = actor_sizes[actor_depth];
    return new Agent{
        {bool(is_tanh), actor_depth, actor_sizes, actor_offsets},
        {bool(is_tanh), critic_depth, critic_sizes, critic_offsets},
        {Kind(kind), {choices, choices + num_choices}, outputs, log_std_offset, reals(outputs), reals(outputs), 0, 0,
         reals(2 * outputs), reals(2 * outputs)},
        reals(CHUNK * stride(actor_sizes[0])),
    };
}

// Write the gradient of the loss (`ppo_loss`) of a minibatch, and its terms in the order of `Losses`.
void compute_gradient(Agent* agent, const Real* weights, const Real* observations, const void* actions,
                      const Real* old_log_probs, const Real* old_values, const Real* advantages, const Real* returns,
                      int64_t num_rows, double mean_rows, double clip_coef, double vf_coef, double ent_coef,
                      int64_t clip_vloss, Real* gradient, Real* losses) {
    auto& [actor, critic, distribution, features] = *agent;
    int64_t num_features = actor.layers[0].inputs, feature_stride = actor.layers[0].in_stride;
    Real epsilon = Real(clip_coef), by_policy = Real(1 / mean_rows), by_value = Real(vf_coef / mean_rows);
    Real by_entropy = Real(-ent_coef / mean_rows);
    double policy_sum = 0, value_sum = 0, entropy_sum = 0, kl_sum = 0, clipped_sum = 0;
    actor.begin(weights), critic.begin(weights), distribution.begin(weights);
    for (int64_t first = 0; first < num_rows; first += CHUNK) {
        int64_t rows = std::min(CHUNK, num_rows - first);
        for (int64_t row = 0; row < rows; ++row)
            std::copy_n(observations + (first + row) * num_features, num_features, &features[row * feature_stride]);
        actor.forward(rows, features.data()), critic.forward(rows, features.data());
        Layer &policy = actor.last(), &value = critic.last();
        for (int64_t row = 0; row < rows; ++row) {
            int64_t i = first + row;
            distribution.evaluate(&policy.values[row * policy.out_stride], actions, i);

            // Where a comparison with NaN decides, it decides for a gradient that is NaN.
            Real log_ratio = distribution.log_prob - old_log_probs[i], ratio = std::exp(log_ratio);
            Real objective = ratio * advantages[i];
            Real clipped = std::min(std::max(ratio, 1 - epsilon), 1 + epsilon) * advantages[i];
            bool is_outside = ratio < 1 - epsilon || ratio > 1 + epsilon;
            Real by_log_prob = is_outside && objective >= clipped ? 0 : -objective * by_policy;

            Real new_value = value.values[row * value.out_stride];
            Real error = new_value - returns[i], square = error * error, slope = 2 * error;
            if (clip_vloss) {
                Real change = new_value - old_values[i];
                Real clipped_error = old_values[i] + std::min(std::max(change, -epsilon), epsilon) - returns[i];
                Real other = clipped_error * clipped_error;
                Real other_slope = change < -epsilon || change > epsilon ? 0 : 2 * clipped_error;
                slope = square > other ? slope : square < other ? other_slope : (slope + other_slope) / 2;
                square = square > other ? square : other;
            }
            distribution.backward(by_log_prob, by_entropy, &policy.slopes[row * policy.out_stride]);
            value.slopes[row * value.out_stride] = by_value * slope;

            policy_sum -= std::min(objective, clipped);
            value_sum += square;
            entropy_sum -= distribution.entropy;
            kl_sum += ratio - 1 - log_ratio;
            clipped_sum += std::abs(ratio - 1) > epsilon;
        }
        actor.backward(rows, features.data()), critic.backward(rows, features.data());
    }
    actor.end(gradient), critic.end(gradient), distribution.end(gradient);
    double loss = policy_sum + vf_coef * value_sum + ent_coef * entropy_sum;
    double sums[] = {loss, policy_sum, value_sum, entropy_sum, kl_sum, clipped_sum};
    for (double sum : sums) *losses++ = Real(sum / mean_rows);
}

// Clip the gradient to a norm, then take a step of Adam (Kingma & Ba 2015, algorithm 1). Return the norm before; if that
// is not finite, nothing else happens.
double descend(int64_t size, const Real* __restrict gradient, Real* __restrict weights, Real* __restrict exp_avg,
               Real* __restrict exp_avg_sq, int64_t num_steps, float* steps, double max_norm, double learning_rate,
               double beta1, double beta2, double eps, double weight_decay) {
    Real squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; ++i) squares += gradient[i] * gradient[i];
    double norm = std::sqrt(double(squares));
    if (!std::isfinite(norm)) return norm;
    for (int64_t i = 0; i < num_steps; ++i) ++steps[i];
    double step = steps[0];
    Real scale = Real(std::min(max_norm / (norm + 1e-6), 1.0)), decay = Real(weight_decay), epsilon = Real(eps);
    Real keep = Real(beta1), keep_sq = Real(beta2), take = Real(1 - beta1), take_sq = Real(1 - beta2);
    Real rate = Real(learning_rate / (1 - std::pow(beta1, step)));
    Real correction = Real(1 / std::sqrt(1 - std::pow(beta2, step)));
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
        Real slope = scale * gradient[i] + decay * weights[i];
        exp_avg[i] = keep * exp_avg[i] + take * slope;
        exp_avg_sq[i] = keep_sq * exp_avg_sq[i] + take_sq * slope * slope;
        weights[i] -= rate * exp_avg[i] / (std::sqrt(exp_avg_sq[i]) * correction + epsilon);
    }
    return norm;
}
}
